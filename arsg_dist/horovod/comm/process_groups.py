"""Groups of ranks, and their collectives beside those of gradients and parameters.

Gather to and scatter from the first rank are all-to-alls in which all but one rank send, or receive, nothing.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import horovod.torch as hvd
import torch
from torch import Tensor

from arsg_dist.engine import JobError
from arsg_dist.engine.messages import check_sizes, decode, encode
from arsg_dist.horovod.comm.environment import in_elastic_job

T = TypeVar("T")
MEETING_TIMEOUT = 300.0
"""Seconds that `Group.meet` waits."""


class Group:
    """Run collectives over the ranks of a Horovod process set.

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
        """Return every rank's `value`, in rank order. Collective.

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
        """Return when every rank has called it. Collective.

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
        """Raise on every rank if the block raises on one. Collective.

        Raises:
            ValueError, TypeError: as the block on this rank.
            JobError: the block raised one of these on another rank.
        """
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
        """Sum a tensor over the ranks. Collective."""
        total: Tensor = hvd.allreduce(
            tensor, op=hvd.Sum, name=f"{self.name}.{what}", process_set=self.process_set
        )
        return total

    def max(self, tensor: Tensor, what: str) -> Tensor:
        """Find the largest over the ranks, element by element. Collective."""
        largest: Tensor = hvd.allreduce(
            tensor, op=hvd.Max, name=f"{self.name}.{what}", process_set=self.process_set
        )
        return largest

    def gather_to_all(self, shard: Tensor, what: str) -> Tensor:
        """Concatenate all shards (1-D, of equal size) on every rank. Collective."""
        gathered = hvd.allgather(bits(shard), name=f"{self.name}.{what}", process_set=self.process_set)
        whole: Tensor = gathered.view(shard.dtype)
        return whole

    def gather_to_first(self, shard: Tensor, what: str) -> Tensor | None:
        """Concatenate all shards (1-D, of equal size) on the first rank. Collective."""
        splits = torch.zeros(self.size, dtype=torch.int32)
        splits[0] = shard.numel()
        received, _ = hvd.alltoall(
            bits(shard), splits=splits, name=f"{self.name}.{what}", process_set=self.process_set
        )
        return received.view(shard.dtype) if self.rank == 0 else None

    def scatter_from_first(self, flat: Tensor | None, numel: int, dtype: torch.dtype, what: str) -> Tensor:
        """Return this rank's `numel` elements of the first rank's `flat`. Collective."""
        splits = torch.full((self.size,), numel if self.rank == 0 else 0, dtype=torch.int32)
        outgoing = flat if flat is not None else torch.empty(0, dtype=dtype)
        assert outgoing.numel() == int(splits.sum())
        received, _ = hvd.alltoall(
            bits(outgoing), splits=splits, name=f"{self.name}.{what}", process_set=self.process_set
        )
        part: Tensor = received.view(dtype)
        return part


def bits(tensor: Tensor) -> Tensor:
    """View memory in a dtype that Horovod can move."""
    return tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor


@dataclass(frozen=True)
class ShardGroups:
    """Name the ranks that share the shards, and those that hold the same shard.

    Attributes:
        shard: the ranks that share one set of shards.
        replicas: the ranks that own the same shard in other such groups, or None.
        world: all ranks that train together; world.size = shard.size × replicas.size.
        elastic: whether ranks come and go.
    """

    shard: Group
    replicas: Group | None
    world: Group
    elastic: bool = False

    @property
    def holds_first_copy(self) -> bool:
        """Whether this rank is in the first of several groups that hold the same shards."""
        return self.replicas is None or self.replicas.rank == 0

    def fail_together(self) -> AbstractContextManager[None]:
        """Raise on every rank if the block raises on one; alone if elastic. Collective."""
        # Where ranks come and go, those that train do not answer to one that is still being built.
        return nullcontext() if self.elastic else self.world.fail_together()


_PROCESS_SETS: dict[tuple[int, ...], Any] = {}


def shard_groups(shard_group: str | int, process_set: Any, label: str) -> ShardGroups:
    """Make the process groups of the shards. Collective, except in an elastic job.

    In an elastic job all ranks share the shards.

    Args:
        shard_group: "job": shards over all ranks. "node": over the ranks of a host, with an all-reduce of the shards
            between hosts. A number: over that many consecutive ranks.
        process_set: the ranks that train together.
        label: precedes the names of all exchanges.

    Raises:
        ValueError: a setting that does not fit the job, on every rank.
    """
    world = Group(process_set, label)
    if in_elastic_job():
        return ShardGroups(world, None, world, elastic=True)
    places = world.all_gather_object((shard_group, hvd.cross_rank()), "shard_group")
    if any(other != places[0][0] for other, _ in places):
        raise ValueError(
            f"shard_group differs between the ranks: {', '.join(repr(other) for other, _ in places)}; give every rank "
            "the same"
        )
    if shard_group == "job":
        return ShardGroups(world, None, world)
    if process_set.process_set_id != 0:
        raise ValueError("shard_group must be 'job' where a process_set is given")
    if shard_group == "node":
        size = hvd.local_size()
        node_of = [cross_rank for _, cross_rank in places]
    elif isinstance(shard_group, int) and not isinstance(shard_group, bool) and shard_group > 0:
        size, node_of = shard_group, [rank // shard_group for rank in range(hvd.size())]
        if hvd.size() % size:
            raise ValueError(f"shard_group={size} does not divide the number of ranks, {hvd.size()}")
    else:
        raise ValueError(f"shard_group must be 'job', 'node' or a number of ranks, got {shard_group!r}")
    if size == hvd.size():
        return ShardGroups(world, None, world)
    nodes: dict[int, list[int]] = {}
    for rank, node in enumerate(node_of):
        nodes.setdefault(node, []).append(rank)
    if {len(ranks) for ranks in nodes.values()} != {size}:
        counts = [len(ranks) for ranks in nodes.values()]
        raise ValueError(
            f"shard_group={shard_group!r} needs as many ranks on every host, and they have {counts}"
        )
    mine = _process_set_of(hvd.rank(), list(nodes.values()))
    replicas = _process_set_of(hvd.rank(), [list(ranks) for ranks in zip(*nodes.values(), strict=True)])
    return ShardGroups(Group(mine, f"{label}.node"), Group(replicas, f"{label}.replicas"), world)


def _process_set_of(rank: int, all_ranks: list[list[int]]) -> Any:
    mine = None
    for ranks in all_ranks:
        key = tuple(ranks)
        if len(ranks) == hvd.size():
            _PROCESS_SETS[key] = hvd.global_process_set  # of which Horovod refuses a duplicate
        if key not in _PROCESS_SETS or _PROCESS_SETS[key].process_set_id is None:
            try:
                _PROCESS_SETS[key] = hvd.add_process_set(ranks)
            except ValueError as error:
                raise ValueError(
                    f"Horovod cannot add the process set {ranks} ({error}): start the job with "
                    "HOROVOD_DYNAMIC_PROCESS_SETS=1, and do not register the same set yourself"
                ) from error
        if rank in ranks:
            mine = _PROCESS_SETS[key]
    assert mine is not None
    return mine
