"""Ranks killed at any moment: the others end, and the run goes on from its last checkpoint with the same bits."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.warm_ranks import EndedJob, WarmRanks

pytestmark = pytest.mark.ranks

ENGINES = ["horovod", "horovod-sharded", "deepspeed"]
EVERY = 2  # updates between checkpoints
# 20 updates of 12 images.
UPDATES = 20
SETTINGS = ["--epochs", "4", "--checkpoint_every", EVERY, "--log_every", "1", "--seed", "7"]
WITHIN = 60  # seconds in which all ranks must have ended; how long it takes is recorded

_whole: dict[str, dict[str, torch.Tensor]] = {}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / "last.safetensors")


def uninterrupted(warm: WarmRanks, engine: str, recipe: list[str], tmp_path: Path) -> dict[str, torch.Tensor]:
    if engine not in _whole:
        job = warm.run(engine, *recipe, *SETTINGS, "--output", tmp_path / "whole", timeout=120)
        assert job.codes == [0, 0], job.output[-6000:]
        _whole[engine] = weights(tmp_path / "whole")
    return _whole[engine]


class KilledRun:
    """One run, killed again and again."""

    def __init__(self, warm: WarmRanks, engine: str, recipe: list[str], directory: Path) -> None:
        self._warm, self._engine, self._recipe, self.directory = warm, engine, recipe, directory
        self.lost: list[int] = []

    def start(self, *faults: dict[str, Any]) -> EndedJob:
        """A start from the last checkpoint, or from the beginning if there is none."""
        done = self.updates_done()
        resumable = bool(list(self.directory.glob("checkpoints/step-*")))
        if not resumable:
            shutil.rmtree(self.directory, ignore_errors=True)
        more = ["--resume"] if resumable else []
        job = self._warm.run(
            self._engine,
            *self._recipe,
            *SETTINGS,
            "--output",
            self.directory,
            *more,
            faults=faults,
            timeout=WITHIN,
        )
        found = re.search(r"resuming from .*: (\d+) updates", job.output)
        assert bool(found) == resumable or job.fault_at is not None, job.output[-6000:]
        if found or not resumable:
            self.lost.append(max(0, done - (int(found.group(1)) if found else 0)))
        return job

    def updates_done(self) -> int:
        path = self.directory / "metrics.jsonl"
        done = 0
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                done = json.loads(line)["update"]
            except json.JSONDecodeError:  # cut off by the kill
                break
        return done

    def kill(self, fault: dict[str, Any]) -> EndedJob:
        job = self.start({**fault, "do": "kill", "directory": str(self.directory)})
        if job.fault_at is None:  # the run was over before
            assert job.codes == [0, 0], job.output[-6000:]
            return job
        assert job.codes[fault["rank"]] in (-9, 0), (fault, job.codes, job.output[-6000:])
        others = [code for rank, code in enumerate(job.codes) if rank != fault["rank"]]
        # A rank that has no more to do with the others may end before the kill of another, which is ending too.
        over = job.codes[fault["rank"]] == 0 or self.updates_done() == UPDATES
        assert over or all(others), (fault, job.codes, job.output[-6000:])
        return job

    def finish(self) -> None:
        job = self.start()
        assert job.codes == [0, 0], job.output[-6000:]


POINTS = [
    {"rank": 0, "point": "forward", "at": 3},
    {"rank": 1, "point": "backward", "at": 4},
    {"rank": 1, "point": "reduce", "at": 3},
    {"rank": 0, "point": "step", "at": 3},
    {"rank": 0, "point": "write", "at": 1},
    {"rank": 0, "point": "sync", "at": 12},  # the first eight are of the run's records
    {"rank": 0, "point": "rename", "at": 1},
]


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, marks=pytest.mark.turn(turn))
        for engine, turn in zip(ENGINES, (2, 0, 1), strict=True)
    ],
)
def test_a_rank_killed_at_named_points(
    engine: str, warm: WarmRanks, recipe: list[str], tmp_path: Path, detection: Callable[..., None]
) -> None:
    """Catches ranks that wait for a dead one, half checkpoints that are resumed from, state a checkpoint lacks, and
    more updates lost than were made since the last checkpoint."""
    expected = uninterrupted(warm, engine, recipe, tmp_path)
    run = KilledRun(warm, engine, recipe, tmp_path / "killed")
    for fault in POINTS:
        job = run.kill(fault)
        seconds = job.seconds_to_end()
        detection(f"kill -9 in {fault['point']}", engine, rank=fault["rank"], seconds=seconds)
    run.finish()
    detection("kill -9: updates lost", engine, lost_updates=max(run.lost))
    assert max(run.lost) <= EVERY
    finished = weights(run.directory)
    for name, tensor in expected.items():
        assert torch.equal(finished[name], tensor), name


@pytest.mark.turn(0)  # in the process: test_run_by_hand
def test_a_rank_killed_before_it_writes_the_last_weights(
    warm: WarmRanks, recipe: list[str], tmp_path: Path
) -> None:
    """Catches weights/ and its card left as an epoch before had them, since the last checkpoint says all is done."""
    expected = uninterrupted(warm, "horovod", recipe, tmp_path)
    run = KilledRun(warm, "horovod", recipe, tmp_path / "killed")
    run.kill({"rank": 0, "point": "weights", "at": 4})
    run.finish()
    finished = weights(run.directory)
    for name, tensor in expected.items():
        assert torch.equal(finished[name], tensor), name
    assert (run.directory / "weights" / "README.md").is_file()


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=pytest.mark.turn(turn)) for turn, engine in enumerate(ENGINES)]
)
def test_a_rank_killed_at_random_moments(
    engine: str,
    warm: WarmRanks,
    recipe: list[str],
    tmp_path: Path,
    detection: Callable[..., None],
    request: pytest.FixtureRequest,
) -> None:
    """Catches moments that nobody thought of, in any call into a library: as above, at hundreds of random times."""
    expected = uninterrupted(warm, engine, recipe, tmp_path)
    chance = random.Random(engine)
    kills = 0
    for number in range(10**6):
        run = KilledRun(warm, engine, recipe, tmp_path / f"killed-{number}")
        while kills < request.config.getoption("--kills"):
            point = chance.choice(["time", "time", "time", "sync", "write"])
            at = chance.uniform(0, 2.5) if point == "time" else chance.randint(1, 4)
            rank = chance.randrange(2) if point == "time" else 0
            job = run.kill({"rank": rank, "point": point, "at": at})
            if job.fault_at is None or job.codes == [0, 0]:
                break
            kills += 1
            detection("kill -9 at random", engine, seconds=job.seconds_to_end())
        else:
            if (run.directory / "checkpoints").is_dir():
                run.finish()
        if run.directory.is_dir() and (run.directory / "weights" / "last.safetensors").exists():
            finished = weights(run.directory)
            for name, tensor in expected.items():
                assert torch.equal(finished[name], tensor), name
        assert max(run.lost, default=0) <= EVERY
        detection("kill -9: updates lost", engine, lost_updates=max(run.lost, default=0))
        shutil.rmtree(run.directory, ignore_errors=True)
        if kills >= request.config.getoption("--kills"):
            break


@pytest.mark.turn(2)
def test_a_rank_that_stands_still_with_open_connections_is_noticed_after_gloos_limit(
    warm: WarmRanks, recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a limit that does not reach Gloo: a killed process that waits for its disk keeps its connections open."""
    monkeypatch.setenv("HOROVOD_GLOO_TIMEOUT_SECONDS", "5")
    silent = {"rank": 1, "do": "fall silent", "seconds": 15, "point": "step", "at": 2}
    settings = [*recipe, *SETTINGS, "--output", tmp_path / "run"]
    job = warm.run("horovod-sharded", *settings, faults=(silent,), timeout=120)
    assert job.codes == [1, -9], job.output[-6000:]
    assert job.fault_at is not None
    assert 4 < job.ended[0] - job.fault_at < job.ended[1] - job.fault_at
