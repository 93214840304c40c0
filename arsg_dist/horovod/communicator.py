"""Collectives over Horovod's ranks."""

from collections.abc import Callable
from typing import TypeVar

import horovod.torch as hvd
import torch

from arsg_dist.engine import Communicator, Ranks
from arsg_dist.horovod.group import Group
from arsg_dist.horovod.guards import check_environment, check_world_size, set_stall_defaults

T = TypeVar("T")


def connect(ranks: Ranks) -> "HorovodCommunicator":
    """Initialises Horovod and returns its communicator.

    A rank that does not come to a collective ends the job after 600 s (`guards.set_stall_defaults`).

    Args:
        ranks: from `discover_ranks`.

    Raises:
        ValueError: the environment mixes MPI and Gloo, or Horovod came up with another number of ranks than the
            launcher announced (it does so silently, as N jobs of one rank, when its controller does not fit).
    """
    check_environment()
    set_stall_defaults()
    hvd.init()
    check_world_size()
    return HorovodCommunicator()


class HorovodCommunicator(Communicator):
    """Collectives over Horovod's global process set; `hvd.init()` must have been called."""

    def __init__(self) -> None:
        self.rank = hvd.rank()
        self.world_size = hvd.size()
        self._group = Group(name="arsg_dist")

    def all_gather_object(self, value: T) -> list[T]:
        """Returns every rank's `value`."""
        return self._group.all_gather_object(value, "object")

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the ranks."""
        total: torch.Tensor = hvd.allreduce(tensor.detach(), op=hvd.Sum, name="arsg_dist.sum")
        return total

    def start_any(self, flag: bool) -> Callable[[], bool]:
        """Asks in main memory, while the caller goes on."""
        handle = hvd.allreduce_async(torch.tensor([int(flag)]), op=hvd.Sum, name="arsg_dist.any")
        return lambda: bool(hvd.synchronize(handle))

    def close(self) -> None:
        """Waits for all ranks and shuts Horovod down."""
        self.barrier()
        hvd.shutdown()
