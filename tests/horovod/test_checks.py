"""What a Horovod user does beside training, and what is refused, on real ranks."""

import pytest

from tests.horovod.checks import REPLICATED, SHARDED
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

JOB = "tests/horovod/jobs/checks_job.py"
LEAVING = "a_rank_that_leaves_lets_the_others_have_the_parameters"
OUTLIVED = ["the_model_outlives_its_optimizer", "a_model_and_its_optimizer_free_everything", LEAVING]
STAYING = [
    name for name in SHARDED if name != LEAVING
]  # a warm rank ends without what a program does at its exit


@pytest.fixture(
    scope="module",
    params=[
        ("warm horovodrun", 2),
        pytest.param(("mpirun", 2), marks=pytest.mark.turn(0)),
        pytest.param(("mpirun", 3), marks=pytest.mark.turn(2)),
        pytest.param(("horovodrun", 2), marks=pytest.mark.turn(1)),
    ],
    ids=str,
)
def output(request: pytest.FixtureRequest) -> str:
    return launch(*request.param, JOB, "replicated").output


@pytest.mark.parametrize("name", list(REPLICATED))
def test_a_replicated_optimizer_keeps_its_promise(output: str, name: str) -> None:
    """Catches what its name says, on any rank; the checks are in tests/horovod/checks/replicated.py."""
    assert f"done: {name}\n" in output, output[-5000:]


@pytest.mark.parametrize(
    ("launcher", "ranks", "names"),
    [
        pytest.param("warm horovodrun", 2, STAYING, id="two ranks"),
        pytest.param("mpirun", 3, OUTLIVED, id="mpirun, outlived", marks=pytest.mark.turn(1)),
        pytest.param("warm alone", 1, STAYING, id="one rank", marks=pytest.mark.turn(0)),
        pytest.param("mpirun", 2, list(SHARDED), id="mpirun", marks=pytest.mark.turn(0)),
        pytest.param("warm horovodrun", 3, STAYING, id="three ranks", marks=pytest.mark.turn(2)),
        pytest.param("horovodrun", 3, OUTLIVED, id="horovodrun, outlived", marks=pytest.mark.turn(2)),
    ],
)
def test_what_users_know_of_a_sharded_optimizer_works_or_is_refused(
    launcher: str, ranks: int, names: list[str]
) -> None:
    """The checks, in tests/horovod/checks, name the bugs they catch: readers that see old parameters, gradients
    that are silently not clipped, written parameters that are overwritten, state lost or cut wrongly, hooks called
    twice, a hang."""
    job = launch(launcher, ranks, JOB, "sharded", *names, timeout=500)
    assert job.code == 0, job.output[-8000:]
    assert job.output.count("done: ") == len(names), job.output
