"""A rank that dies, as the others see it without a launcher that ends them."""

import pytest

from tests.support.launchers import launch


@pytest.mark.ranks
def test_asking_for_operations_while_another_rank_dies_raises() -> None:
    """Catches a rank that hangs for good, where Horovod's background thread ends while tensors are in flight."""
    job = launch("warm horovodrun", 2, "tests/horovod/jobs/lost_rank_job.py")
    assert "raised: Horovod has been shut down" in job.output, job.output[-5000:]
