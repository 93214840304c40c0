"""Which device a rank takes under DeepSpeed, and when, without any."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arsg_dist.deepspeed import engine
from arsg_dist.engine import Ranks


@pytest.mark.parametrize(("visible", "device"), [(4, 3), (1, 0)])
def test_a_rank_takes_its_device_before_the_first_collective(
    visible: int, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches all ranks of a host meeting on GPU 0, and a number that a rank with one GPU of its own does not have."""
    calls: list[Any] = []
    accelerator = SimpleNamespace(
        set_device=lambda index: calls.append(("device", index)), device_name=lambda index: f"cuda:{index}"
    )
    for name, value in (("RANK", "7"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(engine, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(engine.deepspeed, "init_distributed", lambda **_: calls.append("meet"))
    monkeypatch.setattr(engine, "torch_communicator", lambda _, device: calls.append(device))
    monkeypatch.setattr(engine, "release_shared_memory", lambda: None)
    engine.connect(Ranks(7, 8, 3, "srun"))
    assert calls == [("device", device), "meet", torch.device("cuda", device)]
