"""Job for one rank that keeps to what the batch scripts expect of a training: USR1 saves, exit code 75, --resume.

usage: preemptible_job.py --output DIRECTORY --steps N [--resume]
"""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import torch

from arsg_dist.deepspeed import connect
from arsg_dist.engine import discover_ranks, end_process
from arsg_dist.engine.job import PREEMPTED

parser = argparse.ArgumentParser()
parser.add_argument("--output", type=Path)
parser.add_argument("--steps", type=int)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()
told_to_stop = []
signal.signal(signal.SIGUSR1, lambda number, frame: told_to_stop.append(number))
communicator = connect(discover_ranks())
checkpoint = options.output / "checkpoints" / "state.json"
starts = json.loads(checkpoint.read_text()) if options.resume else []
step = starts[-1]["to"] if starts else 0
this = {"from": step, "restarts": os.environ["SLURM_RESTART_COUNT"] if options.resume else "0"}
code = 0
while step < options.steps:
    if communicator.all_reduce_sum(torch.tensor([float(bool(told_to_stop))])).item():
        code = PREEMPTED
        break
    step += 1
    if communicator.rank == 0:
        (options.output / "step").write_text(str(step))
    time.sleep(0.05)
if communicator.rank == 0:
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.write_text(json.dumps([*starts, {**this, "to": step}]))
communicator.close()
end_process(code)
