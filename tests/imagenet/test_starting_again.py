"""What a start finds at its output directory, and what it does there: every state, every way of starting.

The table of docs/reliability.md is made of what happens here:

    python -m pytest tests/imagenet/test_starting_again.py -k table
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from arsg_dist.engine import JobError
from arsg_dist.imagenet.output import run_log
from arsg_dist.imagenet.output.run_directory import LOCK
from arsg_dist.imagenet.output.states import Action, OutputState, Resume, decide, look_at
from arsg_dist.imagenet.training import setup as training
from arsg_dist.imagenet.training.trainer import EpochLoop
from arsg_dist.safe_io import lock
from arsg_dist.safe_io.lock import DirectoryLock
from tests.imagenet.test_run_by_hand import build_model, recipe, records_of, start
from tests.support.launchers import REPOSITORY

WAYS: dict[str, Resume] = {"without `--resume`": False, "`--resume`": True, "`--resume auto`": "auto"}
LAST = 5
"""Update at which the starts of the table end; epochs end with updates 3, 5 and 8."""


@dataclass(frozen=True)
class Outcome:
    """What a start did.

    Attributes:
        code: its exit code.
        first: updates made before its own first one; None: it trained nothing.
        kept: names of records that are in ``earlier-001`` with their content.
        untouched: whether every file is as before.
        text: of the refusal, or what was shown.
    """

    code: int
    first: int | None
    kept: tuple[str, ...]
    untouched: bool
    text: str

    def __str__(self) -> str:
        if self.code:
            assert self.untouched
            return f"refused, code {self.code}"
        if "this run is finished" in self.text:
            return "says that it is finished, code 0"
        where = "starts" if self.first == 0 else f"goes on from update {self.first}"
        return f"{where}, code 0" + ("; the records before are kept in `earlier-001/`" if self.kept else "")


@pytest.fixture(scope="module", autouse=True)
def _linear_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", build_model)
        patch.setattr(run_log, "draw_learning_curve", lambda directory: directory / "none")
        yield


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[OutputState, Path]:
    """A directory in each state; checkpoints at updates 2, 3 and 4 where there are complete ones."""
    root = tmp_path_factory.mktemp("states")
    made = {state: root / state.name for state in OutputState}
    assert start(made[OutputState.COMPLETE], recipe(), max_updates=4) == 0
    assert start(made[OutputState.FINISHED], recipe()) == 0
    assert start(made[OutputState.ANOTHERS], recipe(seed=1), max_updates=4) == 0
    made[OutputState.EMPTY].mkdir()
    (made[OutputState.EMPTY] / "lost+found").mkdir()
    for state in (OutputState.RECORDS, OutputState.HALF, OutputState.DAMAGED):
        shutil.copytree(made[OutputState.COMPLETE], made[state], symlinks=True)
    shutil.rmtree(made[OutputState.RECORDS] / "checkpoints")
    checkpoints = made[OutputState.HALF] / "checkpoints"
    (checkpoints / "step-000000002").rename(checkpoints.parent / "step")
    shutil.rmtree(checkpoints)
    checkpoints.mkdir()
    (checkpoints.parent / "step").rename(checkpoints / ".step-000000002.partial")
    damaged = made[OutputState.DAMAGED] / "checkpoints" / "step-000000004" / "shard-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    return made


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "best" not in path.parts
    }


def outcome(directory: Path, way: Resume, capsys: Any, **settings: Any) -> Outcome:
    """Starts in a directory as the command does."""
    before, firsts = files_of(directory), list[int]()
    real = EpochLoop.__init__

    def noted(self: EpochLoop, parts: Any, checkpoints: Any, at: Any, *more: Any, **options: Any) -> None:
        firsts.append(at.update)
        real(self, parts, checkpoints, at, *more, **options)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochLoop, "__init__", noted)
        try:
            code, text = start(directory, recipe(), resume=way, max_updates=LAST, **settings), ""
        except JobError as error:
            code, text = 2, str(error)
    after = files_of(directory)
    earlier = {
        name.removeprefix("earlier-001/"): content
        for name, content in after.items()
        if "earlier-001/" in name
    }
    assert all(before[name] == content for name, content in earlier.items())
    kept = tuple(sorted({name.split("/")[0] for name in earlier}))
    trained = code == 0 and any(record["update"] > firsts[0] for record in records_of(directory))
    return Outcome(
        code, firsts[0] if trained else None, kept, after == before, text or capsys.readouterr().out
    )


RECORDS = ("classes.txt", "config.yaml", "environment.yaml", "metrics.jsonl", "tensorboard", "weights")
STARTS, REFUSED, FINISHED = (0, 0, ()), (2, None, ()), (0, None, ())
EXPECTED: dict[OutputState, tuple[Any, Any, Any]] = {
    # code, updates before its first one, records kept: without --resume, with it, --resume auto
    OutputState.ABSENT: (STARTS, REFUSED, STARTS),
    OutputState.EMPTY: (STARTS, REFUSED, STARTS),
    OutputState.RECORDS: (REFUSED, REFUSED, (0, 0, RECORDS)),
    OutputState.HALF: (REFUSED, REFUSED, (0, 0, RECORDS)),
    OutputState.COMPLETE: (REFUSED, (0, 4, ()), (0, 4, ())),
    OutputState.DAMAGED: (REFUSED, REFUSED, (0, 3, ())),
    OutputState.FINISHED: (REFUSED, FINISHED, FINISHED),
    OutputState.ANOTHERS: (REFUSED, REFUSED, REFUSED),
}
SAYS = {
    (OutputState.ABSENT, 1): "holds no run; leave --resume out to start one, or give --resume auto",
    (OutputState.EMPTY, 1): "holds no run",
    (
        OutputState.RECORDS,
        0,
    ): "without a complete checkpoint; --resume auto starts it anew and keeps its records",
    (OutputState.RECORDS, 1): "has no complete checkpoint; --resume auto",
    (OutputState.RECORDS, 2): "started anew; the records of the start before are kept in",
    (OutputState.HALF, 1): "has no complete checkpoint; --resume auto",
    (OutputState.COMPLETE, 0): "already holds a run; continue it with --resume",
    (OutputState.DAMAGED, 1): "--skip_damaged goes on from the newest checkpoint that is not damaged",
    (OutputState.DAMAGED, 2): "shard-00000.safetensors is damaged",
    (OutputState.FINISHED, 1): "all 3 epochs done",
    (OutputState.FINISHED, 2): "this run is finished",
    (OutputState.ANOTHERS, 2): "made with seed=1, not 0",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[OutputState, int], Outcome]:
    """Of the cells that have been looked at, for the table."""
    return {}


@pytest.mark.parametrize("way", range(3), ids=["start", "resume", "auto"])
@pytest.mark.parametrize("state", OutputState, ids=lambda state: state.name)
def test_every_state_and_way(
    state: OutputState,
    way: int,
    directories: dict[OutputState, Path],
    outcomes: dict[tuple[OutputState, int], Outcome],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a start over somebody's run, a resume that begins anew, a requeued job that dies or loses what it had, a
    refusal that has touched a file already, and a half or damaged checkpoint that is gone on from."""
    if directories[state].exists():
        shutil.copytree(directories[state], tmp_path / "run", symlinks=True)
    found = outcome(tmp_path / "run", list(WAYS.values())[way], capsys)
    outcomes[state, way] = found
    assert (found.code, found.first, found.kept) == EXPECTED[state][way], found.text
    assert SAYS.get((state, way), "") in found.text
    assert not found.code or found.untouched
    if found.code == 0:
        updates = [record["update"] for record in records_of(tmp_path / "run") if record["kind"] == "train"]
        if state is OutputState.FINISHED:
            assert updates == [3, 5, 6, 8]
        else:  # the record that the first start made of update 4, where it ended, is of the run gone on with
            assert updates == ([3, 4, 5] if found.first == 4 else [3, 5])
        assert (tmp_path / "run" / "checkpoints" / f"step-{updates[-1]:09d}").is_dir()


def test_the_table_of_the_documents_is_this_one(outcomes: dict[tuple[OutputState, int], Outcome]) -> None:
    """Catches documents that promise another thing."""
    if len(outcomes) < 24:
        pytest.skip("made of all the cells")
    rows = [f"| output directory | {' | '.join(WAYS)} |", "|---|---|---|---|"]
    rows += [
        f"| {state.value} | {' | '.join(str(outcomes[state, way]) for way in range(3))} |"
        for state in OutputState
    ]
    assert "\n".join(rows) in (REPOSITORY / "docs" / "reliability.md").read_text(), "\n".join(rows)


def test_what_is_no_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a start that takes somebody's `weights/` or conda's environment.yaml for records, and moves them."""
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "mine.pt").write_text("mine")
    (tmp_path / "thesis.tex").write_text("mine")
    for _ in range(2):
        assert look_at(tmp_path) is OutputState.ANOTHERS
        for way in WAYS.values():
            found = outcome(tmp_path, way, capsys)
            assert (found.code, found.untouched) == (2, True)
            assert "it has " in found.text
        (tmp_path / "environment.yaml").write_text("name: base\ndependencies: [pytorch]\n")


def test_records_of_every_start_are_kept(directories: dict[OutputState, Path], tmp_path: Path) -> None:
    """Catches the second start anew that writes over what the first one kept, or that was killed while it moved."""
    run = tmp_path / "run"
    shutil.copytree(directories[OutputState.RECORDS], run)
    assert start(run, recipe(), resume="auto", max_updates=1) == 0
    shutil.rmtree(run / "checkpoints")
    (run / "config.yaml").unlink()  # killed between two files
    assert start(run, recipe(), resume="auto", max_updates=1) == 0
    of_starts = [
        [record["update"] for record in records_of(run / f"earlier-00{number}")] for number in (1, 2)
    ]
    assert of_starts == [[3, 3, 4], [1]]
    assert [record["update"] for record in records_of(run)] == [1]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    directories: dict[OutputState, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches days of training that an unattended start throws away for a disk that is ill."""
    shutil.copytree(directories[OutputState.DAMAGED], tmp_path / "run", symlinks=True)
    for shard in (tmp_path / "run" / "checkpoints").glob("step-*/shard-*"):
        shard.write_bytes(shard.read_bytes()[:-1])
    found = outcome(tmp_path / "run", "auto", capsys)
    assert (found.code, found.untouched) == (2, True)
    assert "has no complete checkpoint that is whole" in found.text


def test_a_checkpoint_that_was_being_replaced_is_not_lost(
    directories: dict[OutputState, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a kill between two names, when a resumed run saves the same update again: the only checkpoint would count
    as left over, and be removed by the next start."""
    shutil.copytree(directories[OutputState.COMPLETE], tmp_path / "run", symlinks=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    for path in sorted(checkpoints.glob("step-*"))[:-1]:
        shutil.rmtree(path)
    shutil.copytree(checkpoints / "step-000000004", checkpoints / ".step-000000004.partial")
    (checkpoints / "step-000000004").rename(checkpoints / ".step-000000004.replaced")
    found = outcome(tmp_path / "run", "auto", capsys)
    assert (found.code, found.first) == (0, 4), found.text


def test_a_directory_that_is_in_use_is_refused_before_anything_is_touched(
    directories: dict[OutputState, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches two jobs that write one run's files, and a second start that puts a checkpoint back, or moves records,
    under the hands of the first."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    shutil.copytree(directories[OutputState.COMPLETE], tmp_path / "run", symlinks=True)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-000000004").rename(checkpoints / ".step-000000004.replaced")
    first = DirectoryLock(tmp_path / "run", LOCK)
    assert first.take()
    for way in (True, "auto"):
        found = outcome(tmp_path / "run", way, capsys)
        assert (found.code, found.untouched) == (2, True)
        assert f"{tmp_path / 'run'} is in use by process {os.getpid()} on " in found.text
    first.close()
    assert outcome(tmp_path / "run", "auto", capsys).first == 4
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_start_holds_its_directory_from_before_its_first_look_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two jobs started at the same moment: neither finds a file of the other."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    refused = list[str]()

    def start_another(*_: object) -> Path:
        with pytest.raises(JobError, match="is in use by") as error:
            start(tmp_path / "runs" / "a", recipe(), resume="auto", max_updates=1)
        refused.append(str(error.value))
        return tmp_path / "none"

    seen = {"open_splits": training.open_splits, "describe": training.describe}
    for name, real in seen.items():

        def asked(*arguments: Any, real: Any = real, **options: Any) -> Any:
            start_another()
            return real(*arguments, **options)

        monkeypatch.setattr(training, name, asked)
    monkeypatch.setattr(run_log, "draw_learning_curve", start_another)
    assert start(tmp_path / "runs" / "a", recipe(), max_updates=1) == 0
    assert len(refused) >= 3
    assert not (tmp_path / "runs" / "a" / LOCK).exists()


def test_a_start_that_is_refused_leaves_no_directory(tmp_path: Path) -> None:
    """Catches an empty directory for every mistyped setting."""
    with pytest.raises(JobError, match="batch_size"):
        start(tmp_path / "runs" / "a", recipe(batch_size=5, accumulation_steps=2))
    with pytest.raises(JobError, match="holds no run"):
        start(tmp_path / "runs" / "a", recipe(), resume=True)
    assert list(tmp_path.iterdir()) == []


def test_which_start_of_a_batch_job_this_is() -> None:
    """Catches a requeued job that waits for its own earlier start on a host that died."""
    read = training._start_of_batch_job
    assert read({"SLURM_JOB_ID": "7"}) == ("Slurm 7", 0)
    assert read({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == ("Slurm 7", 2)
    assert read({}) is read({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "two"}) is None


def test_only_what_is_new_starts_and_only_what_is_whole_is_gone_on_from() -> None:
    """Catches a row of the table of decisions that is swapped with another."""
    ways = list(WAYS.values())
    assert [s for s in OutputState if decide(s, False) is not Action.REFUSE] == [
        OutputState.ABSENT,
        OutputState.EMPTY,
    ]
    assert [s for s in OutputState if decide(s, True) is Action.GO_ON] == [OutputState.COMPLETE]
    assert [s for s in OutputState if {decide(s, way) for way in ways} == {Action.REFUSE}] == [
        OutputState.ANOTHERS
    ]
