"""Job for one rank: the checks of `tests.horovod.checks`.

usage: checks_job.py replicated|sharded [NAME OF A CHECK]...
"""

import sys
import traceback
import warnings

import horovod.torch as hvd

from arsg_dist.engine import end_process
from tests.horovod.checks import CHECKS
from tests.horovod.jobs import run_job


def run_checks() -> None:
    """Runs checks on every rank. One that fails on any rank ends the job at once, and says which it is.

    Without this the other ranks would wait in a collective until the test's time is over, and nobody would know where.
    """
    checks = CHECKS[sys.argv[1]]
    warnings.simplefilter("ignore")
    rank, size = hvd.rank(), hvd.size()
    for name in sys.argv[2:] or checks:
        try:
            checks[name]()
        except SystemExit:
            raise
        except BaseException:  # pytest's own failures are no Exception
            print(f"check {name!r} failed on rank {rank} of {size}", file=sys.stderr)
            traceback.print_exc()
            end_process(1)  # without waiting for anybody: the launcher ends the other ranks
        if rank == 0:
            print("done:", name, flush=True)


if __name__ == "__main__":
    run_job(run_checks)
