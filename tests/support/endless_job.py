"""Job for one rank: collectives without end, until the loss of another rank ends it.

usage: endless_job.py ENGINE DIRECTORY [--local_rank=N]     each rank makes DIRECTORY/RANK once all are working together
"""

import sys
import time
from pathlib import Path

import torch

from arsg_dist.engine import discover_ranks, end_process

engine, directory = (argument for argument in sys.argv[1:] if not argument.startswith("--"))
ranks = discover_ranks()
if engine == "deepspeed":
    from arsg_dist.deepspeed import connect
else:
    from arsg_dist.horovod import connect
communicator = connect(ranks)
value = torch.ones(1000)
try:
    for step in range(10**6):
        communicator.all_reduce_sum(value)
        if step == 5:
            (Path(directory) / str(ranks.rank)).touch()
        time.sleep(0.1)
except Exception as error:
    print(f"rank {ranks.rank} noticed: {error}", file=sys.stderr, flush=True)
    end_process(1)
