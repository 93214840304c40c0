"""Job for one of two ranks: ARSG over what FSDP2 has sharded against one process, and resumed by torch's means."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from arsg_dist import ARSG
from arsg_dist.engine import end_process
from tests.optim.test_fsdp2 import SETTINGS

FULL = StateDictOptions(full_state_dict=True)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    # 7 and 3 rows do not divide by two ranks; the bias of 1 leaves the second rank an empty shard.
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1))


def train(model: nn.Module, optimizer: ARSG, batches: list[Tensor]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def full(model: nn.Module) -> list[Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 5, generator=generator) for _ in range(10)]
    for name, settings in SETTINGS.items():
        alone, sharded, resumed = small_model(), small_model(), small_model()
        for model in (sharded, resumed):
            fully_shard(model, mesh=mesh)
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
        print("done:", name, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    end_process(0)


if __name__ == "__main__":
    main()
