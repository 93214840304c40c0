"""Which device a rank takes under DeepSpeed, and when, without any."""

import shutil
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


@pytest.mark.parametrize(
    ("device", "local_size", "mib", "refused"),
    [
        ("cpu", "3", 3 * 66, True),
        ("cpu", "3", 3 * 67, False),
        ("cpu", "2", 1, False),
        ("cpu", None, 1, False),
        ("cuda:0", "3", 1, False),
    ],
)
def test_cpu_ranks_without_shared_memory_are_refused_before_they_meet(
    device: str, local_size: str | None, mib: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that die of SIGSEGV in a container's 64 MiB, without a word of why; room for one rank where there
    are several; and a refusal where DeepSpeed takes none: other launchers, several hosts, GPUs."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    if local_size:
        monkeypatch.setenv("LOCAL_SIZE", local_size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=mib << 20))
    if refused:
        with pytest.raises(
            ValueError, match=r"/dev/shm has 198 MiB free.*3 CPU ranks.*need 201.*--shm-size.*torchrun"
        ):
            engine.require_shared_memory(device)
    else:
        engine.require_shared_memory(device)
