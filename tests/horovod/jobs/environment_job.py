"""Job for one rank that meets a wrong environment, or goes wrong on rank 1.

usage: environment_job.py connect|wrap|shard|raise|kill|sleep
"""

import os
import sys
import time

import horovod.torch as hvd
import torch

from arsg_dist import ARSG
from arsg_dist.engine import discover_ranks
from arsg_dist.horovod import DistributedOptimizer, ShardedOptimizer, connect


def main() -> None:
    mode = sys.argv[1]
    if mode in ("wrap", "shard"):
        hvd.init()
        print(f"size is {hvd.size()}")
        (DistributedOptimizer if mode == "wrap" else ShardedOptimizer)(
            ARSG([torch.zeros(1, requires_grad=True)])
        )
        return
    rank = connect(discover_ranks()).rank
    print(f"rank {rank} is connected")
    for step in range(4):
        if rank == 1 and step == 2:
            if mode == "raise":
                raise ValueError("rank 1 gives up")
            if mode == "kill":
                os.kill(os.getpid(), 9)
            if mode == "sleep":
                time.sleep(3600)
        hvd.allreduce(torch.ones(3), name="ones")
    print(f"rank {rank} is done")


if __name__ == "__main__":
    main()
