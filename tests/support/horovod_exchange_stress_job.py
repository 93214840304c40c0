"""Job for one rank: hundreds of exchanges at the sizes of real buckets, compared bit by bit.

usage: horovod_exchange_stress_job.py alltoall | reducescatter
"""

import sys

import horovod.torch as hvd
import torch

from arsg_dist.engine import end_process
from arsg_dist.horovod.exchange import AllToAllReduceScatter, NativeReduceScatter
from arsg_dist.horovod.group import Group
from arsg_dist.horovod.self_test import check_exchanges

ROUNDS = {8: 60, 2: 200, 1: 200, 16: 20, 64: 4}  # by MB; two buckets are under way in each


def main() -> None:
    hvd.init()
    torch.set_num_threads(1)
    group = Group()
    kind = {"alltoall": AllToAllReduceScatter, "reducescatter": NativeReduceScatter}[sys.argv[1]]
    unit = 16 * group.size
    try:
        for megabytes, rounds in ROUNDS.items():
            numel = (megabytes << 18) // unit * unit
            check_exchanges(group, kind(group), [(numel, torch.float32, torch.device("cpu"))], rounds=rounds)
            if group.rank == 0:
                print(f"right: {rounds} rounds of {megabytes} MB", flush=True)
    except RuntimeError as error:
        if group.rank == 0:
            print(f"found: {error}", flush=True)
    hvd.barrier()
    hvd.shutdown()
    end_process(0)


if __name__ == "__main__":
    main()
