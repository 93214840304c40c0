"""Checks on real ranks, one after another."""

import sys
import traceback
from collections.abc import Callable, Mapping

import horovod.torch as hvd

from arsg_dist.engine import end_process


def run_checks(checks: Mapping[str, Callable[[], None]]) -> None:
    """Runs checks on every rank. One that fails on any rank ends the job at once, and says which it is.

    Without this the other ranks would wait in a collective until the test's time is over, and nobody would know where.

    Args:
        checks: name → check.
    """
    rank, size = hvd.rank(), hvd.size()
    for name, check in checks.items():
        try:
            check()
        except SystemExit:
            raise
        except BaseException:  # pytest's own failures are no Exception
            print(f"check {name!r} failed on rank {rank} of {size}", file=sys.stderr)
            traceback.print_exc()
            end_process(1)  # without waiting for anybody: the launcher ends the other ranks
        if rank == 0:
            print("done:", name, flush=True)
