"""FSDP2 over two real ranks: sharded DTensor parameters, state and checkpoints."""

from typing import Any

import pytest

from tests.support.compare import skip_without_sharding_on_cpu
from tests.support.launchers import launch

SETTINGS: dict[str, dict[str, Any]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True, "preconditioner": "adam", "capturable": True},
    "fused": {"fused": True, "preconditioner": "adam"},
    "lookahead": {"lookahead_k": 2, "betas": (0.9, 0.9)},
}


@pytest.mark.ranks
def test_sharded_training_and_its_checkpoint_equal_one_process() -> None:
    """Catches plain tensors mixed with DTensors, empty shards, and settings that checkpoints cannot store."""
    skip_without_sharding_on_cpu()
    job = launch("warm torchrun", 2, "tests/optim/jobs/fsdp2_job.py")
    assert job.code == 0, job.output[-5000:]
    assert [job.output.count(f"done: {name}\n") for name in SETTINGS] == [2] * len(SETTINGS)
