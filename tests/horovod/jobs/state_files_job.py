"""Job for one rank: goes on with the toy problem from a file that rank 0 alone reads, and writes the next one.

usage: state_files_job.py DIRECTORY UPDATE

For each dtype it reads DIRECTORY/UPDATE-DTYPE.pt unless UPDATE is 0, makes the update of that number, and writes
DIRECTORY/(UPDATE + 1)-DTYPE.pt.
"""

import sys
from pathlib import Path

import horovod.torch as hvd
import torch

from arsg_dist import ARSG
from arsg_dist.horovod import ShardedOptimizer
from tests.horovod.jobs import run_job
from tests.support import toy


def main() -> None:
    directory, update = Path(sys.argv[1]), int(sys.argv[2])
    for dtype in (torch.float32, torch.bfloat16):
        model = toy.build_model().to(dtype)
        file, next_file = (directory / f"{number}-{dtype}.pt" for number in (update, update + 1))
        saved = torch.load(file, weights_only=True) if update and hvd.rank() == 0 else None
        if saved:
            model.load_state_dict(saved["model"])
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer = ShardedOptimizer(
            ARSG(model.parameters(), **toy.HYPERPARAMETERS), model.named_parameters(), bucket_mb=0.01
        )
        if update:
            optimizer.load_state_dict(saved and saved["optimizer"])
        share_of_batch(model, update, hvd.rank(), hvd.size()).backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if hvd.rank() == 0:
            torch.save(state, next_file)
        optimizer.close()


def share_of_batch(model: torch.nn.Module, update: int, rank: int, world_size: int) -> torch.Tensor:
    """The loss of a rank's part of a batch."""
    dtype = next(model.parameters()).dtype
    rows = slice(rank * toy.BATCH // world_size, (rank + 1) * toy.BATCH // world_size)
    inputs, targets = (tensor[rows].to(dtype) for tensor in toy.batch(update))
    return toy.loss_of(model(inputs), targets)


if __name__ == "__main__":
    run_job(main)
