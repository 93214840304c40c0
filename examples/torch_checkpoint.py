"""torch.distributed.checkpoint: torchrun --nproc-per-node 2 examples/torch_checkpoint.py --output weights.safetensors

Trains half of the updates under FSDP2, saves, and goes on in a new network and optimizer that load it.
"""

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from task import OPTIMIZERS, UPDATES, Network, options, save, share_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

chosen = options(optimizer=[*OPTIMIZERS])
directory = str(chosen.output.with_suffix(".checkpoint"))
dist.init_process_group()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))


def build() -> tuple[nn.Module, Optimizer]:
    """Make a sharded network and its optimizer."""
    network = Network()
    fully_shard(network, mesh=mesh)
    return network, OPTIMIZERS[chosen.optimizer](network.parameters())


def train(network: nn.Module, optimizer: Optimizer, updates: int) -> None:
    """Make some updates."""
    for _ in range(updates):
        optimizer.zero_grad()
        network(*share_of(dist.get_rank(), dist.get_world_size()))["loss"].backward()
        optimizer.step()


network, optimizer = build()
train(network, optimizer, UPDATES // 2)
model_state, optimizer_state = get_state_dict(network, optimizer)
dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)

network, optimizer = build()
model_state, optimizer_state = get_state_dict(network, optimizer)  # of the right names and shapes
dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
set_state_dict(network, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
train(network, optimizer, UPDATES - UPDATES // 2)
whole = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    save(whole, chosen.output)
dist.destroy_process_group()
