"""What the wrapped optimizer promises beside the weights; each check runs on real ranks."""

import pytest

from tests.horovod.jobs.replicated_checks_job import CHECKS
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks


@pytest.fixture(
    scope="module",
    params=[("mpirun", 2), ("mpirun", 3), ("horovodrun", 2)],
    ids=lambda job: f"{job[0]}{job[1]}",
)
def output(request: pytest.FixtureRequest) -> str:
    return launch(*request.param, "tests/horovod/jobs/replicated_checks_job.py").output


@pytest.mark.parametrize("name", list(CHECKS))
def test_on_ranks(output: str, name: str) -> None:
    """Catches what its name says, on any rank; the checks are in tests/horovod/jobs/replicated_checks_job.py."""
    assert f"done: {name}\n" in output, output[-5000:]
