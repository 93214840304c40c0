"""Job for one rank: the checks of `tests.horovod.sharded_checks`.

usage: sharded_checks_job.py [NAME OF A CHECK]...
"""

import sys

import horovod.torch as hvd
import torch

from arsg_dist.engine import end_process
from tests.horovod.jobs.checks import run_checks
from tests.horovod.sharded_checks import CHECKS


def main() -> None:
    hvd.init()
    torch.set_num_threads(1)
    run_checks({name: CHECKS[name] for name in sys.argv[1:]} or CHECKS)
    if hvd.is_initialized():
        hvd.barrier()
        hvd.shutdown()
    end_process(0)


if __name__ == "__main__":
    main()
