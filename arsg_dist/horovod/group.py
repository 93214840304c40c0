"""The ranks of a Horovod process set, and what they tell each other beside gradients and parameters.

Gather to and scatter from the first rank are all-to-alls in which all but one rank send, or receive, nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import horovod.torch as hvd
import torch
from torch import Tensor

from arsg_dist.engine import JobError
from arsg_dist.engine.messages import check_sizes, decode, encode

T = TypeVar("T")
MEETING_TIMEOUT = 300.0
"""Seconds that `Group.meet` waits."""


class Group:
    """The ranks of a process set, as seen from one of them.

    Args:
        process_set: default all ranks.
        name: precedes the name of every operation.
    """

    def __init__(self, process_set: Any = hvd.global_process_set, name: str = "sharded") -> None:
        self.process_set = process_set
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()
        self.name = name

    def all_gather_object(self, value: T, what: str) -> list[T]:
        """Returns every rank's `value`, in rank order.

        Args:
            value: as for `messages.encode`.
            what: names the operation in Horovod's stall warnings.

        Raises:
            TypeError: on every rank: a rank has a value of another kind.
        """
        message = encode(value)
        sizes = hvd.allgather(
            torch.tensor([message.numel()]), name=f"{self.name}.{what}.size", process_set=self.process_set
        ).tolist()
        check_sizes(sizes)
        data = hvd.allgather(message, name=f"{self.name}.{what}", process_set=self.process_set)
        return decode(data.split(sizes))

    def meet(self, what: str) -> None:
        """Returns when every rank has called it.

        Raises:
            RuntimeError: the others have not come: in a Horovod script such a call often stands under
                `if hvd.rank() == 0`, and waiting for ever would hide that.
        """
        handle = hvd.allgather_async(
            torch.zeros(1, dtype=torch.uint8), name=f"{self.name}.{what}", process_set=self.process_set
        )
        deadline = time.monotonic() + MEETING_TIMEOUT
        pause = 1e-4
        while not hvd.poll(handle):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{what} of a sharded optimizer is a collective operation: rank {self.rank} called it and "
                    f"others did not within {MEETING_TIMEOUT:g} s; call it on every rank, outside 'if hvd.rank() == 0'"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        hvd.synchronize(handle)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """If the block raises ValueError or TypeError on a rank, every rank raises: its own error, or `JobError`."""
        error: Exception | None = None
        try:
            yield
        except (ValueError, TypeError) as raised:
            error = raised
        errors = self.all_gather_object(None if error is None else str(error), "check")
        if error is not None:
            raise error
        if any(errors):
            raise JobError("\n".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text))

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """Sum over the ranks."""
        total: Tensor = hvd.allreduce(
            tensor, op=hvd.Sum, name=f"{self.name}.{what}", process_set=self.process_set
        )
        return total

    def max(self, tensor: Tensor, what: str) -> Tensor:
        """Largest over the ranks, element by element."""
        largest: Tensor = hvd.allreduce(
            tensor, op=hvd.Max, name=f"{self.name}.{what}", process_set=self.process_set
        )
        return largest

    def gather_to_all(self, shard: Tensor, what: str) -> Tensor:
        """All shards (1-D, of equal size) one after another, on every rank."""
        gathered = hvd.allgather(bits(shard), name=f"{self.name}.{what}", process_set=self.process_set)
        whole: Tensor = gathered.view(shard.dtype)
        return whole

    def gather_to_first(self, shard: Tensor, what: str) -> Tensor | None:
        """All shards (1-D, of equal size) one after another, on the group's first rank; None on the others."""
        splits = torch.zeros(self.size, dtype=torch.int32)
        splits[0] = shard.numel()
        received, _ = hvd.alltoall(
            bits(shard), splits=splits, name=f"{self.name}.{what}", process_set=self.process_set
        )
        return received.view(shard.dtype) if self.rank == 0 else None

    def scatter_from_first(self, flat: Tensor | None, numel: int, dtype: torch.dtype, what: str) -> Tensor:
        """This rank's part of the first rank's `flat`: its `numel` elements of numel × size."""
        splits = torch.full((self.size,), numel if self.rank == 0 else 0, dtype=torch.int32)
        outgoing = flat if flat is not None else torch.empty(0, dtype=dtype)
        assert outgoing.numel() == int(splits.sum())
        received, _ = hvd.alltoall(
            bits(outgoing), splits=splits, name=f"{self.name}.{what}", process_set=self.process_set
        )
        part: Tensor = received.view(dtype)
        return part


def bits(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that Horovod can move."""
    return tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor
