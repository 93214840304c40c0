"""Collectives over Horovod's ranks."""

from typing import TypeVar

import horovod.torch as hvd
import torch

from arsg_dist.engine import Communicator, Ranks

T = TypeVar("T")


def connect(ranks: Ranks) -> "HorovodCommunicator":
    """Initialises Horovod and returns its communicator.

    Args:
        ranks: from `discover_ranks`.

    Raises:
        ValueError: Horovod came up with another number of ranks than the launcher announced (it does so silently,
            as N jobs of one rank, when its controller does not fit the launcher).
    """
    hvd.init()
    if hvd.size() != ranks.world_size:
        raise ValueError(
            f"{ranks.launcher} announced {ranks.world_size} ranks but Horovod came up with {hvd.size()}: "
            "use horovodrun, or mpirun with HOROVOD_CONTROLLER and HOROVOD_CPU_OPERATIONS unset; "
            "'horovodrun --check-build' shows what Horovod was built with"
        )
    return HorovodCommunicator()


class HorovodCommunicator(Communicator):
    """Collectives over Horovod's global process set; `hvd.init()` must have been called."""

    def __init__(self) -> None:
        self.rank = hvd.rank()
        self.world_size = hvd.size()

    def all_gather_object(self, value: T) -> list[T]:
        """Returns every rank's `value`."""
        values: list[T] = hvd.allgather_object(value, name="arsg_dist.object")
        return values

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the ranks."""
        total: torch.Tensor = hvd.allreduce(tensor.detach(), op=hvd.Sum, name="arsg_dist.sum")
        return total

    def close(self) -> None:
        """Waits for all ranks and shuts Horovod down."""
        self.barrier()
        hvd.shutdown()
