"""The three exchanges that sharding is made of, over the ranks of a Horovod process set.

**Reduce-scatter.** Horovod 0.28.1's own `reducescatter` corrupts data over Gloo now and then, without an error (with
2 ranks and 2 MB about every 13th time; timing decides), so it is refused there. An all-to-all followed by a local sum
in fp32 has no such fault on any backend, rounds less for half precision and on CPU costs the same or less; it is the
default. On CUDA with NCCL as the only backend, NCCL's own reduce-scatter is the default.

**All-gather** writes into the parameters' own memory. **Gather to and scatter from rank 0** are all-to-alls in which
all but one rank send, or receive, nothing.

bf16 is unknown to Horovod: where data are only moved its bits travel as fp16, and sums are made here.
"""

import io
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops
from torch import Tensor

from arsg_dist.engine import JobError
from arsg_dist.horovod.buffer_pool import BufferPool

T = TypeVar("T")
ReduceScatterPath = Literal["auto", "alltoall", "reducescatter"]
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
        """Every rank's `value`, in rank order; `what` names the operation in Horovod's stall warnings."""
        payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = hvd.allgather(
            torch.tensor([len(payload)]), name=f"{self.name}.{what}.size", process_set=self.process_set
        )
        data = hvd.allgather(payload, name=f"{self.name}.{what}", process_set=self.process_set)
        return [pickle.load(io.BytesIO(part.numpy().tobytes())) for part in data.split(sizes.tolist())]

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


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums and of master weights: fp32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)


@dataclass
class Started:
    """An exchange under way."""

    handle: int
    result: Callable[[Any], Tensor]

    def done(self) -> bool:
        """Whether `finish` would return at once."""
        return bool(hvd.poll(self.handle))

    def finish(self) -> Tensor:
        """Waits for the end and returns the result."""
        return self.result(hvd.synchronize(self.handle))

    def discard(self) -> None:
        """Frees what an exchange of a job that is no more holds; to be called once Horovod has been shut down."""
        # Waiting for one that Horovod lost could last for ever; it stays in Horovod's table.
        if self.handle in mpi_ops._handle_map and self.done():
            with suppress(HorovodInternalError):
                hvd.synchronize(self.handle)


class AllToAllReduceScatter:
    """Sends every rank its shard of the bucket and sums up what arrives, in fp32 and in the order of the ranks."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def start(self, wire: Tensor, decode: Callable[[Tensor], Tensor], name: str, pool: BufferPool) -> Started:
        """Begins the exchange of a bucket.

        Args:
            wire: 1-D, world_size shards; must not be changed until the end.
            decode: undoes a compression.
            name: of the bucket, the same on all ranks.
            pool: where the memory comes from of what arrives, and of the result, which is the caller's to give back.
        """
        received = pool.take(wire.numel(), wire.dtype, wire.device)
        shard_numel = wire.numel() // self.group.size
        # Horovod's public form allocates its output. It resizes one of the wrong size without a word.
        handle = mpi_ops._alltoall_async(
            bits(wire),
            torch.full((self.group.size,), shard_numel, dtype=torch.int32),
            bits(received),
            torch.empty(self.group.size, dtype=torch.int32),
            f"{self.group.name}.alltoall.{name}",
            self.group.process_set,
        )

        def summed(_: Any) -> Tensor:
            parts = decode(received).view(self.group.size, -1)
            dtype = sum_dtype(parts.dtype)
            shard = pool.take(shard_numel, dtype, parts.device)
            torch.sum(parts, 0, dtype=dtype, out=shard)
            pool.give_back(received)
            return shard

        return Started(handle, summed)


class NativeReduceScatter:
    """Horovod's own operation; not for Gloo and not for bf16."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def start(self, wire: Tensor, decode: Callable[[Tensor], Tensor], name: str, pool: BufferPool) -> Started:
        """As `AllToAllReduceScatter.start`."""
        if wire.dtype == torch.bfloat16:
            return AllToAllReduceScatter(self.group).start(wire, decode, name, pool)

        def decoded(shard: Tensor) -> Tensor:
            shard = decode(shard)
            return shard.to(sum_dtype(shard.dtype))

        handle = hvd.reducescatter_async(
            wire,
            op=hvd.Sum,
            name=f"{self.group.name}.reducescatter.{name}",
            process_set=self.group.process_set,
        )
        return Started(handle, decoded)


ReduceScatter = AllToAllReduceScatter | NativeReduceScatter


def choose_reduce_scatter(path: str, group: Group, device: str) -> ReduceScatter:
    """The exchange to use for gradients.

    Args:
        path: "alltoall", "reducescatter" or "auto" (see the module).
        group: the ranks.
        device: type of the device the gradients are on.

    Raises:
        ValueError: an unknown path, or "reducescatter" where its data may be processed by Gloo.
    """
    if path not in ("auto", "alltoall", "reducescatter"):
        raise ValueError(f"reduce_scatter={path!r} is not known; use 'auto', 'alltoall' or 'reducescatter'")
    on_nccl = device == "cuda" and bool(hvd.nccl_built())
    if path == "reducescatter" and hvd.gloo_enabled() and not on_nccl:
        raise ValueError(
            "reduce_scatter='reducescatter' is refused over Gloo: Horovod's implementation there was seen to return "
            "wrong sums without an error; use 'auto'"
        )
    if path == "reducescatter" or (path == "auto" and on_nccl and not hvd.gloo_enabled()):
        return NativeReduceScatter(group)
    return AllToAllReduceScatter(group)


# Horovod joins all-gathers of one dtype that are asked for together, and then copies everything into a buffer and out
# of it again. These all move as they are over MPI, Gloo and NCCL, so neighbouring buckets travel as different ones.
_MOVED_AS = (
    torch.float32,
    torch.int32,
    torch.float16,
    torch.uint8,
    torch.int64,
    torch.float64,
    torch.int8,
)


def start_all_gather(
    group: Group, shard: Tensor, bucket: Tensor, name: str, number: int, pool: BufferPool
) -> Started:
    """Begins to fill `bucket` (1-D, world_size shards) in place with every rank's part of it.

    Args:
        group: the ranks.
        shard: what goes into this rank's part, converted to the dtype of `bucket`; may be that part itself.
        bucket: the result.
        name: of the bucket, the same on all ranks.
        number: of the bucket among those that are started together, the same on all ranks.
        pool: for a copy of the shard, which MPI wants apart from the result.
    """
    outgoing = pool.take(shard.numel(), bucket.dtype, bucket.device)
    outgoing.copy_(shard)
    moved_as = _MOVED_AS[number % len(_MOVED_AS)]
    assert bucket.is_contiguous()
    assert bucket.numel() == shard.numel() * group.size
    handle = mpi_ops._allgather_async(
        outgoing.view(moved_as), bucket.view(moved_as), f"{group.name}.allgather.{name}", group.process_set
    )

    def filled(_: Any) -> Tensor:
        pool.give_back(outgoing)
        return bucket

    return Started(handle, filled)
