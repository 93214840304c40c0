"""Plain torch, DDP: torchrun --nproc-per-node 2 examples/torch_ddp.py --output weights.safetensors"""

import torch.distributed as dist
from task import OPTIMIZERS, UPDATES, Network, options, save, share_of
from torch.nn.parallel import DistributedDataParallel

chosen = options(optimizer=[*OPTIMIZERS])
dist.init_process_group()
network = DistributedDataParallel(Network())
optimizer = OPTIMIZERS[chosen.optimizer](network.parameters())  # arsg_dist.ARSG(network.parameters(), lr=...)
for _ in range(UPDATES):
    optimizer.zero_grad()
    network(*share_of(dist.get_rank(), dist.get_world_size()))["loss"].backward()
    optimizer.step()
if dist.get_rank() == 0:
    save(network.module.state_dict(), chosen.output)
dist.destroy_process_group()
