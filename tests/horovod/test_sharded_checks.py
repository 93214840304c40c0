"""What a Horovod user does beside training, and what is refused, on real ranks with a sharded optimizer."""

import pytest

from tests.horovod.sharded_checks import CHECKS
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

JOB = "tests/horovod/jobs/sharded_checks_job.py"


OUTLIVED = [
    "the_model_outlives_its_optimizer",
    "a_model_and_its_optimizer_free_everything",
    "a_rank_that_leaves_lets_the_others_have_the_parameters",
]


@pytest.mark.parametrize(
    ("launcher", "ranks", "names"),
    [
        ("mpirun", 2, list(CHECKS)),
        ("mpirun", 3, OUTLIVED),
        pytest.param("alone", 1, list(CHECKS), marks=pytest.mark.slow),
        pytest.param("horovodrun", 3, list(CHECKS), marks=pytest.mark.slow),
    ],
)
def test_what_users_know_works_or_is_refused(launcher: str, ranks: int, names: list[str]) -> None:
    """The checks, in tests/horovod/sharded_checks, name the bugs they catch: readers that see old parameters, gradients
    that are silently not clipped, written parameters that are overwritten, state lost or cut wrongly, hooks called
    twice, a hang."""
    job = launch(launcher, ranks, JOB, *names, timeout=500)
    assert job.code == 0, job.output[-8000:]
    assert job.output.count("done: ") == len(names), job.output
