"""What the wrapped optimizer promises beside the weights; each check runs on real ranks."""

from pathlib import Path

import pytest
import torch

from tests.support.horovod_checks_job import CHECKS
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks


@pytest.fixture(
    scope="module",
    params=[("mpirun", 2), ("mpirun", 3), ("horovodrun", 2)],
    ids=lambda job: f"{job[0]}{job[1]}",
)
def failed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output: Path = tmp_path_factory.mktemp("job") / "failed.pt"
    job = launch(*request.param, "tests/support/horovod_checks_job.py", output)
    assert job.code == 0, job.output[-5000:]
    found: dict[str, str] = torch.load(output, weights_only=True)
    return found


@pytest.mark.parametrize("name", list(CHECKS))
def test_on_ranks(failed: dict[str, str], name: str) -> None:
    """Catches what its name says, on any rank; the checks are in tests/support/horovod_checks_job.py."""
    assert not failed[name], failed[name]
