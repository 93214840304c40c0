"""What each rank of a test's job runs."""

from collections.abc import Callable

import horovod.torch as hvd
import torch

from arsg_dist.engine import end_process


def run_job(body: Callable[[], None]) -> None:
    """Runs a program on this rank of Horovod, which it may have left, and ends the rank in an orderly way."""
    hvd.init()
    torch.set_num_threads(1)
    body()
    if hvd.is_initialized():
        hvd.barrier()
        hvd.shutdown()
    end_process(0)
