"""Keep a directory of checkpoints in which only complete ones can be seen."""

import json
import math
import re
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from arsg_dist.checkpoint.memory import Memory
from arsg_dist.engine import Communicator
from arsg_dist.safe_io.documents import read_json
from arsg_dist.safe_io.files import append_text, remove_tree, sync, write_text

_NAME: Final = re.compile(r"step-([0-9]{9,})")
_LEFT: Final = re.compile(
    r"\.step-[0-9]{9,}\.(([0-9a-f]{16}\.)?partial|replaced|removed)|\.best\.[0-9a-f]{16}\.(partial|replaced)"
)
"""Names that only a store makes, and that a job which was killed may leave."""
_REPLACED: Final = re.compile(r"\.(step-[0-9]{9,})\.replaced")
_BEST: Final = "best"
_SCORE: Final = "score.json"
_SCORE_LIMIT: Final = 1024
_POLL_SECONDS: Final = 0.1


class CheckpointStore:
    """Keep checkpoints ``step-000001234`` in a directory that all ranks share.

    A checkpoint is written under a name that `latest` does not see, synced, and renamed: after a crash at any moment
    every visible one is complete. The link ``best`` leads to the one with the highest score.

    The store removes nothing but old checkpoints and what it has under its own hidden names. A link to the directory is
    followed, since the program's author named it; one in the place of a checkpoint, or in it, is not.

    Args:
        directory: created by the first `save`.
        communicator: of all ranks of the job.
        keep: how many checkpoints to keep, at least 1; older ones are removed after a new one is in place. The one with
            the highest score is kept besides.

    Attributes:
        memory: for copies of states that are saved in the background; for `save_run`.
    """

    def __init__(self, directory: Path, communicator: Communicator, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = directory
        self._communicator = communicator
        self._keep = keep
        self._saving: _Saving | None = None
        self._prefix = ""  # of the names under which this store writes, the same on every rank
        self._saves = 0
        self.memory = Memory()

    def complete(self) -> list[Path]:
        """Find the complete checkpoints, oldest first.

        Raises:
            ValueError: a link or a file has the name of one.
        """
        return complete_in(self.directory)

    def latest(self) -> Path | None:
        """Find the newest complete checkpoint, if there is one; raises as `complete`."""
        complete = self.complete()
        return complete[-1] if complete else None

    def best(self) -> Path | None:
        """Find the checkpoint with the highest score, the earliest of several; None if none has a score.

        Raises:
            ValueError: as `complete`, or a score that is no finite number.
        """
        scores = {path: score for path in self.complete() if (score := _score_of(path)) is not None}
        return max(scores, key=lambda path: scores[path]) if scores else None

    def check(self) -> None:
        """Check that the store can go on with what is in its directory: nothing foreign at the names it uses.

        Raises:
            ValueError: as `best`, or something other than its link is at ``best``.
        """
        self.best()
        self._copy_of_best()

    def _copy_of_best(self) -> Path | None:
        """Find what a copy of the directory that followed the link ``best`` has in its place; None for the link.

        Raises:
            ValueError: something else is there.
        """
        path = self.directory / _BEST
        if path.is_symlink() or not path.exists():
            return None
        if path.is_dir() and any(_sizes(path) == _sizes(checkpoint) for checkpoint in self.complete()):
            return path
        raise ValueError(
            f"{path} is in the place of the link to the best checkpoint, and no copy of one: move it elsewhere"
        )

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        conclude: Callable[[Path], None] | None = None,
        *,
        score: float | None = None,
        wait: bool = True,
    ) -> Path:
        """Make a checkpoint; a save under way is finished first. Collective.

        Args:
            step: updates made so far; names the checkpoint.
            write: writes this rank's part into the directory it is given, which exists, and syncs it. Runs in a thread.
            conclude: what rank 0 does there when every rank has written. Runs in a thread.
            score: larger is better (validation accuracy); None for one that was not validated.
            wait: return when it is in place; else at once, and `finish` or the next `save` waits.

        Returns:
            The checkpoint's path.

        Raises:
            JobError: on every rank, when this one (if waited for) or the one before failed on any: disk full, ..., or
                something foreign at a name of the store's, or a score that is not finite. Older checkpoints are
                untouched.
        """
        self.finish()
        path = self.directory / f"step-{step:09d}"
        partial = self._partial(path.name)
        leader = self._communicator.rank == 0

        # In the thread, like all that touches the disk: where that is slow, the smallest of it can take seconds.
        def write_own(directory: Path) -> None:
            if leader:
                if score is not None and not math.isfinite(score):
                    raise ValueError(
                        f"the score of a checkpoint is {score}: it must be a finite number, or None"
                    )
                self.check()
            directory.mkdir(parents=True, exist_ok=True)  # whichever rank comes first
            if leader:
                self._remove_left_over(besides=directory)
            write(directory)

        def put_in_place() -> None:
            if conclude is not None:
                conclude(partial)
            if score is not None:
                write_text(partial / _SCORE, json.dumps(score))
            for rank in range(self._communicator.world_size):
                (partial / _written(rank)).unlink(missing_ok=True)
            for file in [*partial.iterdir(), partial]:
                sync(file)
            if path.is_dir():  # the same step again, after a resume
                path.rename(self.directory / f".{path.name}.replaced")
            partial.rename(path)
            sync(self.directory)
            self._tidy()

        self._saving = _Saving(
            partial,
            self._communicator.rank,
            self._communicator.world_size,
            write_own,
            put_in_place if leader else None,
        )
        if wait:
            self.finish()
        return path

    def finish(self) -> None:
        """Wait until the last `save` is in place. Collective.

        Raises:
            JobError: on every rank, if it failed on any.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            with self._communicator.fail_together(OSError, ValueError):
                saving.join_written()
        except BaseException:
            saving.give_up()
            raise
        with self._communicator.fail_together(OSError, ValueError):
            saving.join_concluded()

    def _partial(self, name: str) -> Path:
        """Name the directory in which a checkpoint is written: no earlier job's, and alike on all ranks."""
        self._prefix = self._prefix or self._communicator.from_rank_0(secrets.token_hex(4))
        self._saves += 1
        return self.directory / f".{name}.{self._prefix}{self._saves:08x}.partial"

    def _tidy(self) -> None:
        best = self.best()
        if best is not None:
            beside = self.directory / f".{_BEST}.{secrets.token_hex(8)}"
            link = beside.with_name(f"{beside.name}.partial")
            link.symlink_to(best.name)
            copy = self._copy_of_best()
            if copy is not None:
                copy.rename(beside.with_name(f"{beside.name}.replaced"))
            link.rename(self.directory / _BEST)
        for old in self.complete()[: -self._keep]:
            if old != best:
                # Renamed first: a job killed while it removes leaves nothing that looks complete.
                old.rename(self.directory / f".{old.name}.removed")
        self._remove_left_over()

    def _remove_left_over(self, *, besides: Path | None = None) -> None:
        for path in list(self.directory.iterdir()):
            if _LEFT.fullmatch(path.name) and path != besides:
                remove_tree(path)


def complete_in(directory: Path) -> list[Path]:
    """Find the complete checkpoints of a store's directory, oldest first; see `CheckpointStore.complete`."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    for path in found:
        if path.is_symlink() or not path.is_dir():
            raise ValueError(
                f"{path} is a {'link' if path.is_symlink() else 'file'} where a checkpoint's directory belongs, "
                "and is not followed: put the directory itself there, or remove it"
            )
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def put_back(directory: Path) -> None:
    """Give a checkpoint its name back that a job was killed at replacing, between the old one's leave and the new one.

    Raises:
        OSError: it cannot be renamed.
    """
    for path in list(directory.iterdir()) if directory.is_dir() else ():
        replaced = _REPLACED.fullmatch(path.name)
        if replaced and not (directory / replaced[1]).exists():
            path.rename(directory / replaced[1])


def holds_half(directory: Path) -> bool:
    """Tell whether a job that was killed, or met a full disk, left a checkpoint unfinished in a store's directory."""
    return directory.is_dir() and any(_LEFT.fullmatch(path.name) for path in directory.iterdir())


@dataclass
class _Saving:
    """Follow a checkpoint that threads of the ranks write without messages.

    Each rank leaves an empty file when its part is on the disk; rank 0 waits until it sees those of all, or until
    `join_concluded` tells it that they are there.
    """

    directory: Path
    rank: int
    world_size: int
    write: Callable[[Path], None]
    conclude: Callable[[], None] | None
    _failed: BaseException | None = None
    _all_written: threading.Event = field(default_factory=threading.Event)
    _given_up: threading.Event = field(default_factory=threading.Event)
    _own_written: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        # A daemon: a rank that ends because of an error elsewhere does not wait for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.write(self.directory)
            append_text(self.directory / _written(self.rank), "")
        except OSError as error:
            self._failed = OSError(f"cannot write the checkpoint {self.directory}: {error}")
        except BaseException as error:
            self._failed = error
        finally:
            self._own_written.set()
        if self.conclude is None or self._failed is not None:
            return
        try:
            while not (self._all_written.is_set() or self._seen()):
                if self._given_up.wait(_POLL_SECONDS):
                    return
            self.conclude()
        except BaseException as error:
            self._failed = error

    def _seen(self) -> bool:
        return all((self.directory / _written(rank)).exists() for rank in range(self.world_size))

    def join_written(self) -> None:
        """Wait for this rank's part; raise what went wrong with it."""
        self._own_written.wait()
        if self._failed is not None:
            raise self._failed

    def give_up(self) -> None:
        """Give the checkpoint up: another rank has not written its part."""
        self._given_up.set()
        self._thread.join()

    def join_concluded(self) -> None:
        """Wait until the checkpoint is in place, when every rank has written."""
        self._all_written.set()
        self._thread.join()
        if self._failed is not None:
            raise self._failed


def _written(rank: int) -> str:
    return f".written-{rank:05d}"


def _score_of(checkpoint: Path) -> float | None:
    path = checkpoint / _SCORE
    try:
        score = read_json(path, limit=_SCORE_LIMIT)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}{_WITHOUT_SCORE}") from error
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
        raise ValueError(f"{path} is damaged: a score is a finite number{_WITHOUT_SCORE}")
    return float(score)


_WITHOUT_SCORE: Final = "; remove the file, and the checkpoint counts as one without a score"


def _sizes(directory: Path) -> dict[str, int]:
    return {path.name: path.lstat().st_size for path in directory.iterdir()}
