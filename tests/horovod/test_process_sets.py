"""Optimizers of some of the ranks of a job."""

import pytest

from tests.support.launchers import launch

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("launcher", ["mpirun", pytest.param("warm horovodrun", marks=pytest.mark.slow)])
def test_some_ranks_train_together(launcher: str) -> None:
    """Catches an exchange with ranks of another set, an average over the wrong number, a state on the wrong rank, and
    a hang of an optimizer of all ranks after one of some."""
    variables = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    job = launch(launcher, 4, "tests/horovod/jobs/process_sets_job.py", variables=variables)
    assert job.code == 0, job.output[-8000:]
    assert job.output.count("done: ") == 2, job.output
