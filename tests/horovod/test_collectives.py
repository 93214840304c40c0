"""The exchange of gradients at the sizes of real buckets, and the one that must not be used."""

import re

import pytest

from tests.horovod.jobs.exchange_stress_job import ROUNDS
from tests.horovod.test_sharded import MPI_AND_GLOO
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

JOB = "tests/horovod/jobs/exchange_stress_job.py"


@pytest.mark.parametrize(("launcher", "ranks"), MPI_AND_GLOO)
def test_the_chosen_exchange_is_right_every_time(launcher: str, ranks: int) -> None:
    """Catches data that arrive wrong once in hundreds of times."""
    job = launch(launcher, ranks, JOB, "alltoall")
    assert job.code == 0, job.output[-5000:]
    assert job.output.count("right: ") == len(ROUNDS), job.output[-5000:]


@pytest.mark.turn(1, of=12)  # with a sum that is made wrong: test_silent_faults
def test_the_guards_find_the_corruption_of_reducescatter_over_gloo() -> None:
    """Catches a check that does not see the very fault it is there for.

    Timing decides how often Horovod 0.28.1 is wrong, so a run in which it never was shows nothing, and is skipped. Seen
    on two ranks: 31 of 400 rounds of 2 MB; on another machine within 20 to 230 rounds of 2 MB, or never in 900, and
    within 90 rounds of 32 MB.
    """
    job = launch("horovodrun", 2, JOB, "reducescatter", 32, 80, timeout=300)
    assert job.code == 0, job.output[-5000:]
    right = re.findall(r"(self-test|second sums): (0 of \d+ rounds)", job.output)
    for way, message in {
        "self-test": "the exchange of gradients is not reliable here: NativeReduceScatter returned",
        "second sums": "the sum of bucket",
    }.items():
        assert way in dict(right) or re.search(rf"{way}: found in \d+ rounds: {message}", job.output), (
            job.output
        )
    if right:
        pytest.skip(f"not wrong: {right}")
