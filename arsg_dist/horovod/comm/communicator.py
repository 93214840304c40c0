"""Implement the communicator of an engine with Horovod."""

from collections.abc import Callable
from typing import TypeVar

import horovod.torch as hvd
import torch

from arsg_dist.engine import Communicator, Ranks, check_hosts
from arsg_dist.horovod.comm.environment import (
    check_environment,
    check_world_size,
    in_elastic_job,
    set_stall_defaults,
)
from arsg_dist.horovod.comm.process_groups import Group

T = TypeVar("T")


def connect(ranks: Ranks) -> "HorovodCommunicator":
    """Initialise Horovod and return its communicator. Collective, except in an elastic job.

    A rank that does not come to a collective ends the job after 600 s (`set_stall_defaults`).

    Args:
        ranks: from `discover_ranks`.

    Raises:
        ValueError: the environment mixes MPI and Gloo, or Horovod came up with another number of ranks than the
            launcher announced (it does so silently, as N jobs of one rank, when its controller does not fit).
        JobError: it came up on fewer hosts than it was started for. In an elastic job hosts come and go.
    """
    check_environment()
    set_stall_defaults()
    hvd.init()
    check_world_size()
    communicator = HorovodCommunicator()
    if not in_elastic_job():  # where ranks that come later would ask those that train
        check_hosts(communicator)
    return communicator


class HorovodCommunicator(Communicator):
    """Run collectives over Horovod's global process set, after `hvd.init()`."""

    def __init__(self) -> None:
        self.rank = hvd.rank()
        self.world_size = hvd.size()
        self._group = Group(name="arsg_dist")

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's `value`. Collective."""
        return self._group.all_gather_object(value, "object")

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks. Collective."""
        return self._group.sum(tensor.detach(), "sum")

    def start_any(self, flag: bool) -> Callable[[], bool]:
        """Ask in main memory, while the caller goes on. Collective."""
        handle = hvd.allreduce_async(torch.tensor([int(flag)]), op=hvd.Sum, name="arsg_dist.any")
        return lambda: bool(hvd.synchronize(handle))

    def close(self) -> None:
        """Wait for all ranks and shut Horovod down. Collective."""
        self.barrier()
        hvd.shutdown()
