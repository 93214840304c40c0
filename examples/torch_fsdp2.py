"""Plain torch, FSDP2: torchrun --nproc-per-node 2 examples/torch_fsdp2.py --output weights.safetensors

The optimizer is made after `fully_shard`, over the sharded parameters.
"""

import torch.distributed as dist
from task import OPTIMIZERS, UPDATES, Network, options, save, share_of
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

chosen = options(optimizer=[*OPTIMIZERS])
dist.init_process_group()
network = Network()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # "cuda" on GPUs
for layer in (network.hidden, network.head, network):
    fully_shard(layer, mesh=mesh)
optimizer = OPTIMIZERS[chosen.optimizer](network.parameters())
for _ in range(UPDATES):
    optimizer.zero_grad()
    network(*share_of(dist.get_rank(), dist.get_world_size()))["loss"].backward()
    optimizer.step()
whole = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    save(whole, chosen.output)
dist.destroy_process_group()
