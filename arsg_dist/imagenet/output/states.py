"""Name the states that an output directory can be in, and decide what a start does there.

The first look needs names alone. What is in a complete checkpoint tells the rest: whether it is damaged, of a run that
is finished, or of another run (`RunCheckpoints.resume`).
"""

import re
from enum import Enum
from pathlib import Path
from typing import Final, Literal, TypeAlias

from arsg_dist.checkpoint.store import complete_in, holds_half
from arsg_dist.imagenet.output.run_directory import (
    CHECKPOINTS,
    CLASSES,
    CONFIG,
    CURVE,
    ENVIRONMENT,
    LOCK,
    METRICS,
    TENSORBOARD,
    WANDB,
    WEIGHTS,
    directory_of,
    read_environments,
)
from arsg_dist.imagenet.signals import MARKER
from arsg_dist.safe_io.files import is_partial_file, make_directory
from arsg_dist.safe_io.text import printable

Resume: TypeAlias = bool | Literal["auto"]
"""How a start was asked for: False for a new run, True for one that goes on, "auto" for whichever fits."""


class OutputState(Enum):
    """What a start finds at its output directory."""

    ABSENT = "absent"
    EMPTY = "empty"
    RECORDS = "records, but no complete checkpoint"
    HALF = "records and half a checkpoint"
    COMPLETE = "a complete checkpoint"
    DAMAGED = "the newest checkpoint is damaged"
    FINISHED = "the run is finished"
    ANOTHERS = "another run's, or something else"


class Action(Enum):
    """What a start does."""

    START = "starts"
    START_BESIDE = "starts, and keeps the records beside the new ones"
    GO_ON = "goes on"
    GO_ON_BEFORE = "goes on from the newest checkpoint that is whole"
    FINISHED = "says that the run is finished"
    REFUSE = "refused"


_ACTIONS: Final = {
    # state: without --resume, --resume, --resume auto
    OutputState.ABSENT: (Action.START, Action.REFUSE, Action.START),
    OutputState.EMPTY: (Action.START, Action.REFUSE, Action.START),
    OutputState.RECORDS: (Action.REFUSE, Action.REFUSE, Action.START_BESIDE),
    OutputState.HALF: (Action.REFUSE, Action.REFUSE, Action.START_BESIDE),
    OutputState.COMPLETE: (Action.REFUSE, Action.GO_ON, Action.GO_ON),
    OutputState.DAMAGED: (Action.REFUSE, Action.REFUSE, Action.GO_ON_BEFORE),
    OutputState.FINISHED: (Action.REFUSE, Action.FINISHED, Action.FINISHED),
    OutputState.ANOTHERS: (Action.REFUSE, Action.REFUSE, Action.REFUSE),
}
_WAYS: Final[tuple[Resume, ...]] = (False, True, "auto")


def decide(state: OutputState, resume: Resume) -> Action:
    """Decide what a start does at an output directory: the only place that does."""
    return _ACTIONS[state][_WAYS.index(resume)]


def look_at(output: Path) -> OutputState:
    """Tell the state of an output directory by the names in it; `COMPLETE` stands for what checkpoints tell.

    Raises:
        ValueError: it is no directory, or a link or a file is where a directory of a run or a checkpoint belongs.
    """
    if not output.exists():
        return OutputState.ABSENT
    if not output.is_dir():
        raise ValueError(f"output {output} is not a directory")
    names = _names_in(output)
    if not names:
        return OutputState.EMPTY
    checkpoints = directory_of(output, CHECKPOINTS) if CHECKPOINTS in names else None
    if checkpoints and complete_in(checkpoints):
        return OutputState.COMPLETE
    # A start writes ENVIRONMENT first. Without it, one foreign name is enough: `weights/` may be anybody's.
    if not (_is_of_a_run(output) if ENVIRONMENT in names else all(map(_is_ours, names))):
        return OutputState.ANOTHERS
    return OutputState.HALF if checkpoints and holds_half(checkpoints) else OutputState.RECORDS


def refusal(state: OutputState, resume: Resume, output: Path) -> str:
    """Say why a start is refused there, and what to do, for states that `look_at` tells."""
    if state is OutputState.ANOTHERS:
        first = printable(sorted(_names_in(output))[0])
        if resume is True:
            return (
                f"--resume: output directory {output} holds no run (it has {first}); choose another --output"
            )
        return f"output directory {output} is not empty (it has {first}); choose another --output"
    if state in (OutputState.ABSENT, OutputState.EMPTY):
        return (
            f"--resume: output directory {output} holds no run; leave --resume out to start one, or give "
            "--resume auto, which starts one where there is none"
        )
    if state is OutputState.COMPLETE:
        return f"output directory {output} already holds a run; continue it with --resume, or choose another --output"
    beside = "--resume auto starts it anew and keeps its records"
    if resume is True:
        return f"--resume: {output} has no complete checkpoint; {beside}, or start anew with another --output"
    return (
        f"output directory {output} already holds a run, without a complete checkpoint; {beside}, or choose another "
        "--output"
    )


_EARLIER: Final = re.compile(r"earlier-[0-9]{3,}")
_RECORDS: Final = (CONFIG, METRICS, ENVIRONMENT, CLASSES, CURVE, MARKER, TENSORBOARD, WEIGHTS)
_NO_CONTENT: Final = ("lost+found", LOCK)
"""What says nothing of a run; the first is in the root of a fresh file system, as a container's volume is."""


def keep_earlier_records(output: Path) -> Path | None:
    """Move what an earlier start recorded into a directory ``earlier-001`` (or the next number) beside it.

    Half a checkpoint stays: the next save removes it, and its name is no record.

    Returns:
        The directory; None where there was nothing.

    Raises:
        OSError: it cannot be moved.
    """
    names = _names_in(output) if output.is_dir() else set()
    records = sorted(name for name in names if name in _RECORDS)
    if not records:
        return None
    taken = [int(name.removeprefix("earlier-")) for name in names if _EARLIER.fullmatch(name)]
    earlier = make_directory(output, f"earlier-{max(taken, default=0) + 1:03d}")
    for name in records:
        (output / name).rename(earlier / name)
    return earlier


def _names_in(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()} - set(_NO_CONTENT)


def _is_ours(name: str) -> bool:
    return name in (*_RECORDS, CHECKPOINTS, WANDB) or bool(_EARLIER.fullmatch(name)) or is_partial_file(name)


def _is_of_a_run(output: Path) -> bool:
    try:
        read_environments(output)
    except ValueError:  # as an environment.yaml of conda's
        return False
    return True
