"""Two ranks under DDP train by a submission, each on its half of every batch."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arsg_dist.engine import end_process
from tests.benchmarks.algoperf_interface import Workload, batch_of, run, submission

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
for name in ("arsg", "remote_adamw"):
    module, workload = submission(name), Workload()
    # Without batch norm, whose statistics are of a rank's own half, the halves are one batch.
    layers = [layer for layer in workload.init_model_fn(3) if not isinstance(layer, nn.BatchNorm1d)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    state = module.init_optimizer_state(workload, model, None, None, None)
    for step in range(4):
        own = {key: value.chunk(ranks)[rank] for key, value in batch_of(step).items()}
        state = run(module, workload, model, state, None, step, own)
    torch.save([param.detach() for param in model.parameters()], f"{sys.argv[1]}/{name}{rank}.pt")
dist.destroy_process_group()
end_process(0)
