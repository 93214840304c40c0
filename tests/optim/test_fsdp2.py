"""FSDP2 over two real ranks: sharded DTensor parameters, state and checkpoints."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from arsg_dist import ARSG
from arsg_dist.engine import end_process
from tests.support.compare import skip_without_sharding_on_cpu

WORLD = 2
SETTINGS = [
    {"foreach": False},
    {"foreach": True, "preconditioner": "adam", "capturable": True},
    {"fused": True, "preconditioner": "adam"},
    {"lookahead_k": 2, "betas": (0.9, 0.9)},
]
FULL = StateDictOptions(full_state_dict=True)


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    # 7 and 3 rows do not divide by two ranks; the bias of 1 leaves the second rank an empty shard.
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1)
    )


def train(model: torch.nn.Module, optimizer: ARSG, batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def full(model: torch.nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def check_on_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 5, generator=generator) for _ in range(10)]
    for settings in SETTINGS:
        alone, sharded, resumed = small_model(), fully_shard(small_model(), mesh=mesh), small_model()
        fully_shard(resumed, mesh=mesh)
        reference = ARSG(alone.parameters(), lr=0.01, **{**settings, "foreach": False, "fused": False})
        optimizer = ARSG(sharded.parameters(), lr=0.01, **settings)
        train(alone, reference, batches[:5])
        train(sharded, optimizer, batches[:5])
        torch.testing.assert_close(full(sharded), full(alone), rtol=1e-5, atol=1e-6)
        with optimizer.base_iterate(), reference.base_iterate():
            torch.testing.assert_close(full(sharded), full(alone), rtol=1e-5, atol=1e-6)

        successor = ARSG(resumed.parameters(), lr=0.5, **settings)
        saved = get_optimizer_state_dict(sharded, optimizer, options=FULL)
        set_optimizer_state_dict(resumed, successor, saved, options=FULL)
        with torch.no_grad():
            for x, y in zip(resumed.parameters(), sharded.parameters(), strict=True):
                x.copy_(y)
        train(sharded, optimizer, batches[5:])
        train(resumed, successor, batches[5:])
        torch.testing.assert_close(full(resumed), full(sharded), rtol=0, atol=0)
    dist.barrier()
    dist.destroy_process_group()
    end_process(0)


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore")
def test_sharded_training_and_its_checkpoint_equal_one_process(tmp_path: FilePath) -> None:
    """Catches plain tensors mixed with DTensors, empty shards, and settings that checkpoints cannot store."""
    skip_without_sharding_on_cpu()
    torch.multiprocessing.spawn(check_on_rank, (str(tmp_path / "rendezvous"),), nprocs=WORLD)
