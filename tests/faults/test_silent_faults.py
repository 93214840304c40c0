"""Faults that raise no error of their own: numbers that are not finite, slow ranks, corrupted weights and sums."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.warm_ranks import EndedJob, WarmRanks

pytestmark = pytest.mark.ranks

# 10 updates of 12 images.
SETTINGS = ["--checkpoint_every", "2", "--seed", "7"]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))


def assert_refused(job: EndedJob, message: str) -> None:
    """Every rank ends with the code of an agreed end, and rank 0 says why, once."""
    assert set(job.codes) == {2}, job.output[-6000:]
    assert job.output.count(message) == 1, job.output[-6000:]
    assert "Traceback" not in job.output


@pytest.mark.parametrize("engine", ["horovod", "horovod-sharded", "deepspeed", "deepspeed-3"])
def test_nan_on_one_rank_stops_all(
    engine: str, warm: WarmRanks, recipe: list[str], tmp_path: Path, detection: Callable[..., None]
) -> None:
    """Catches a run that trains on with NaN, or saves it over the last good checkpoint."""
    fault = {"rank": 1, "do": "nan loss", "point": "loss", "at": 4}
    job = warm.run(engine, *recipe, *SETTINGS, faults=(fault,))
    assert_refused(job, "update 4 is not finite")
    if engine.startswith("horovod"):
        assert "the loss of update 4 is not finite on rank 1 (" in job.output
    assert checkpoints(tmp_path / "run") == [2]
    detection("NaN in the loss of one rank", engine, seconds=job.seconds_to_end())


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("horovod", marks=pytest.mark.turn(1)),
        "horovod-sharded",
        pytest.param("deepspeed-0", marks=pytest.mark.turn(2)),
        "deepspeed",
        pytest.param("deepspeed-3", marks=pytest.mark.turn(0)),
    ],
)
def test_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(
    engine: str, warm: WarmRanks, recipe: list[str], tmp_path: Path
) -> None:
    """Catches ranks of which some make the update and some do not, and state that the skipped update has changed."""
    fault = {"rank": 1, "do": "nan gradient", "point": "gradient", "at": 3}
    job = warm.run(engine, *recipe, *SETTINGS, "--on_nonfinite", "skip", faults=(fault,))
    assert job.codes == [0, 0], job.output[-6000:]
    assert "the skipped step changed nothing: True" in job.outputs[1], job.output[-6000:]
    train = [record for record in records(tmp_path / "run") if record["kind"] == "train"]
    # Every two updates, and at the end of each epoch of five.
    assert [record.get("skipped_updates", 0) for record in train] == [0, 1, 1, 1, 1, 1]


def test_too_many_skipped_updates_stop_the_run(warm: WarmRanks, recipe: list[str], tmp_path: Path) -> None:
    """Catches a run that skips for ever."""
    faults = tuple({"rank": 0, "do": "nan gradient", "point": "gradient", "at": at} for at in (3, 4))
    settings = ["--on_nonfinite", "skip", "--max_skipped_updates", "1"]
    job = warm.run("horovod", *recipe, *SETTINGS, *settings, faults=faults)
    assert_refused(job, "the gradients of 2 updates one after another, the last of them 4, are not finite")


@pytest.mark.parametrize("engine", ["horovod", pytest.param("deepspeed", marks=pytest.mark.turn(1))])
def test_a_slow_rank_is_named(engine: str, warm: WarmRanks, recipe: list[str]) -> None:
    """Catches a warning that names those who wait for the slow rank, or none."""
    fault = {"rank": 1, "do": "sleep", "seconds": 0.4, "point": "every forward", "at": 1}
    job = warm.run(engine, *recipe, *SETTINGS, faults=(fault,))
    assert job.codes == [0, 0], job.output[-6000:]
    # Once where the machine is quiet: that rule is tested in test_health.
    assert "warning: rank 1 on " in job.outputs[0], job.output[-6000:]
    assert "rank 0 on" not in job.output


@pytest.mark.parametrize("engine", ["horovod", "deepspeed-0"])
def test_a_flipped_bit_in_one_ranks_weights_is_found(
    engine: str, warm: WarmRanks, recipe: list[str], detection: Callable[..., None]
) -> None:
    """Catches weights that drift apart unnoticed: one bit of one weight, which no loss would show."""
    fault = {"rank": 2, "do": "flip a bit", "point": "after step", "at": 3}
    job = warm.run(engine, *recipe, *SETTINGS, "--check_replicas_every", "2", faults=(fault,), ranks=3)
    assert_refused(job, "rank 2 differs from the 2 others, which agree")
    detection("one bit of a weight flipped", engine, seconds=job.seconds_to_end())


def test_a_wrong_sum_of_gradients_is_found(
    warm: WarmRanks, recipe: list[str], detection: Callable[..., None]
) -> None:
    """Catches what Horovod's reducescatter over Gloo does: a sum that is wrong, without an error, in one element of one
    bucket, which its owner hands on to all ranks, so that their weights are wrong alike."""
    fault = {"rank": 1, "do": "wrong sum", "point": "reduce-scatter", "at": 4}
    job = warm.run("horovod-sharded", *recipe, *SETTINGS, "--check_replicas_every", "4", faults=(fault,))
    message = "the sum of part0.gradient0 that rank 1 received is not the one that rank 0 computed"
    assert_refused(job, message)
    detection("wrong sum in a reduce-scatter", "horovod-sharded", seconds=job.seconds_to_end())


@pytest.mark.turn(1)
def test_all_is_well_without_a_fault(warm: WarmRanks, recipe: list[str]) -> None:
    """Catches a watch that stops sound runs."""
    for engine in ("horovod", "horovod-sharded", "deepspeed-2"):
        output = [*recipe[:2], "--output", str(warm.directory / f"well-{engine}")]
        watch = ["--check_replicas_every", "1", "--on_nonfinite", "skip"]
        job = warm.run(engine, *output, *SETTINGS, *watch)
        assert job.codes == [0, 0], job.output[-6000:]
        assert "is not finite" not in job.output


def test_zero_3_has_no_replicas_to_compare(warm: WarmRanks, recipe: list[str]) -> None:
    """Catches a setting that is ignored."""
    job = warm.run("deepspeed-3", *recipe, "--check_replicas_every", "2")
    assert_refused(job, "check_replicas_every does not work with ZeRO stage 3")
