"""Memory, disk, data and clock fail on one rank, or on all."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults.test_kills import SETTINGS, uninterrupted, weights
from tests.faults.test_silent_faults import assert_refused, checkpoints
from tests.support.warm_ranks import WarmRanks

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ("horovod", "run out of memory"),
        ("horovod-sharded", "raise out of memory"),
        ("deepspeed", "run out of memory"),
        ("deepspeed-3", "raise out of memory"),
    ],
)
def test_one_rank_without_memory_ends_all(
    engine: str,
    fault: str,
    warm: WarmRanks,
    recipe: list[str],
    tmp_path: Path,
    detection: Callable[..., None],
) -> None:
    """Catches ranks that wait for one that could not go on, until a timeout of half an hour."""
    faults = ({"rank": 1, "do": fault, "point": "forward", "at": 4},)
    job = warm.run(engine, *recipe, "--checkpoint_every", "2", faults=faults)
    assert all(job.codes), job.output[-6000:]
    assert "rank 1 failed" in job.outputs[1]
    assert "memory" in job.outputs[1]
    assert checkpoints(tmp_path / "run") == [2]
    detection("out of memory on one rank", engine, seconds=job.seconds_to_end())


@pytest.mark.parametrize("engine", ["horovod", "deepspeed"])
def test_a_file_system_that_becomes_read_only(
    engine: str, warm: WarmRanks, recipe: list[str], tmp_path: Path, detection: Callable[..., None]
) -> None:
    """Catches ranks that wait for the one that could not write, and a damaged older checkpoint."""
    faults = ({"rank": "all", "do": "read-only", "point": "after step", "at": 3},)
    job = warm.run(engine, *recipe, "--checkpoint_every", "2", faults=faults)
    assert_refused(job, "Read-only file system")
    assert checkpoints(tmp_path / "run") == [2]
    detection("read-only file system while saving", engine, seconds=job.seconds_to_end())


@pytest.mark.parametrize("engine", ["horovod", "deepspeed"])
def test_images_that_vanish_in_mid_run(
    engine: str,
    warm: WarmRanks,
    recipe: list[str],
    small_tree: Path,
    tmp_path: Path,
    detection: Callable[..., None],
) -> None:
    """Catches a loader that waits for ever, or a traceback on one rank."""
    faults = ({"rank": 0, "do": "remove data", "directory": str(small_tree), "point": "after step", "at": 3},)
    job = warm.run(engine, *recipe, "--checkpoint_every", "2", faults=faults)
    assert_refused(job, "--data.on_bad_image skip")
    assert f"cannot decode image {small_tree}" in job.output
    assert checkpoints(tmp_path / "run") == [2]
    detection("data files vanish", engine, seconds=job.seconds_to_end())


@pytest.mark.parametrize(
    ("engine", "number", "reason"),
    [
        pytest.param("horovod", "SIGKILL", "has ended: killed by SIGKILL", marks=pytest.mark.turn(1)),
        pytest.param(
            "ddp", "SIGSTOP", "no batch came from the loader processes in 6 s", marks=pytest.mark.turn(0)
        ),
    ],
)
def test_loader_processes_of_one_rank_that_die_or_hang_end_all(
    engine: str,
    number: str,
    reason: str,
    warm: WarmRanks,
    recipe: list[str],
    tmp_path: Path,
    detection: Callable[..., None],
) -> None:
    """Catches a rank that waits for its loader processes for ever, and the others for it."""
    loading = [
        "--data.workers",
        "1",
        "--data.timeout",
        "6" if number == "SIGSTOP" else "300",
        "--epochs",
        "4",
    ]
    fault = {"rank": 1, "do": "signal loaders", "signal": number, "point": "after step", "at": 3}
    job = warm.run(engine, *recipe, *loading, "--checkpoint_every", "2", faults=(fault,))
    assert all(job.codes), job.output[-6000:]
    assert re.search(rf"error: .*{reason}.* \(rank 1\)", job.outputs[1]), job.output[-6000:]
    assert "Traceback" not in job.outputs[1]
    assert checkpoints(tmp_path / "run")[0] == 2
    detection(f"loader processes get {number}", engine, seconds=job.seconds_to_end())


@pytest.mark.turn(2)
def test_a_clock_that_is_a_day_wrong(warm: WarmRanks, recipe: list[str], tmp_path: Path) -> None:
    """Catches checkpoints ordered by time: the ones of a host whose clock is behind would look old."""
    expected = uninterrupted(warm, "horovod", recipe, tmp_path)
    run = [*recipe, *SETTINGS, "--output", str(tmp_path / "skewed")]
    behind = {"rank": 0, "do": "skew the clock", "seconds": -86400, "point": "start", "at": 1}
    ahead = {"rank": 1, "do": "skew the clock", "seconds": 86400, "point": "start", "at": 1}
    job = warm.run("horovod", *run, "--max_updates", "7")
    assert job.codes == [0, 0], job.output[-6000:]
    job = warm.run("horovod", *run, "--max_updates", "13", "--resume", faults=(behind, ahead))
    assert job.codes == [0, 0], job.output[-6000:]
    assert ": 6 updates" in job.output
    old = time.time() - 10 * 86400
    for path in (tmp_path / "skewed" / "checkpoints" / "step-000000012").rglob("*"):
        import os

        os.utime(path, (old, old))
    job = warm.run("horovod", *run, "--resume", faults=(ahead,))
    assert job.codes == [0, 0], job.output[-6000:]
    assert ": 12 updates" in job.output
    for name, tensor in weights(tmp_path / "skewed").items():
        assert torch.equal(tensor, expected[name]), name
