"""Reduce-scatter gradients and all-gather parameters over a process group.

**Reduce-scatter.** Horovod 0.28.1's own `reducescatter` corrupts data over Gloo now and then, without an error (with
2 ranks and 2 MB about every 13th time; timing decides), so it is refused there. An all-to-all followed by a local sum
in fp32 has no such fault on any backend, rounds less for half precision and on CPU costs the same or less; it is the
default. On CUDA with NCCL as the only backend, NCCL's own reduce-scatter is the default.

**All-gather** writes into the parameters' own memory.

Between two ranks both are a swap: each sends the other what it lacks, from where it lies to where it belongs. Through
Horovod's operations a rank's own part would be copied on its way to itself, which takes as long as the message.

bf16 is unknown to Horovod: its bits travel as fp16, and sums are made here.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops
from torch import Tensor

from arsg_dist.horovod.comm.process_groups import Group, bits
from arsg_dist.horovod.comm.tensors_in_flight import tables_of_handles

ReduceScatterPath = Literal["auto", "alltoall", "reducescatter"]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and of masters: fp32 for half precision, else the same."""
    return torch.promote_types(dtype, torch.float32)


class BufferPool:
    """Reuse the memory of collectives, update after update.

    Lends 1-D tensors on the CPU and keeps their memory when they come back.

    The C library returns large blocks to the system, and getting them again page by page costs as much time as the
    exchange they are for. Accelerators' allocators keep memory themselves, so there `take` makes a new tensor.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.UntypedStorage]] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Lend a tensor with arbitrary contents."""
        if device.type != "cpu":
            return torch.empty(numel, dtype=dtype, device=device)
        free = self._free.get(numel * dtype.itemsize)
        if not free:
            return torch.empty(numel, dtype=dtype)
        return torch.empty(0, dtype=dtype).set_(free.pop(), 0, (numel,))  # type: ignore[call-overload,no-any-return]

    def give_back(self, tensor: Tensor) -> None:
        """Take back a whole tensor that nobody uses, pending collectives included."""
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            self._free.setdefault(storage.nbytes(), []).append(storage)


@dataclass
class Started:
    """Hold a pending collective; dropped, it frees its memory when Horovod is done.

    Several threads may wait for it.
    """

    handle: int
    result: Callable[[Any], Tensor]
    failure: HorovodInternalError | None = None
    finished: Tensor | None = None
    _waiting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        # Horovod's Python side keeps the tensors until somebody waits. Its core has references of its own.
        for table in tables_of_handles():
            weakref.finalize(self, table.pop, self.handle, None).atexit = False

    def done(self) -> bool:
        """Tell whether `finish` would return at once."""
        return self.failure is not None or self.finished is not None or bool(hvd.poll(self.handle))

    def finish(self) -> Tensor:
        """Wait for the end and return the result.

        Raises:
            HorovodInternalError: the exchange failed; at every call.
        """
        with self._waiting:  # Horovod answers the second thread at once
            if self.failure is not None:
                raise self.failure
            if self.finished is None:
                try:
                    output = hvd.synchronize(self.handle)
                except HorovodInternalError as failure:
                    self.failure = failure
                    raise
                self.finished = self.result(output)
            return self.finished


class AllToAllReduceScatter:
    """Reduce-scatter by an all-to-all and a local sum.

    Sends every rank its shard of the bucket and sums up what arrives, in fp32 and in the order of the ranks.
    """

    def __init__(self, group: Group) -> None:
        self.group = group

    def start(self, wire: Tensor, decode: Callable[[Tensor], Tensor], name: str, pool: BufferPool) -> Started:
        """Begin the reduce-scatter of a bucket. Collective.

        Args:
            wire: 1-D, world_size shards; must not be changed until the end.
            decode: undoes a compression.
            name: of the bucket, the same on all ranks.
            pool: where the memory comes from of what arrives, and of the result, which is the caller's to give back.
        """
        name = f"{self.group.name}.alltoall.{name}"
        shards = wire.view(self.group.size, -1)
        if self.group.size == 2:
            received = pool.take(shards[0].numel(), wire.dtype, wire.device)
            handle = _swap(self.group, shards[1 - self.group.rank], received, name)
        else:
            received = pool.take(wire.numel(), wire.dtype, wire.device)
            splits = torch.full((self.group.size,), shards[0].numel(), dtype=torch.int32)
            handle = _all_to_all(self.group, wire, splits, received, name)

        def summed(_: Any) -> Tensor:
            arrived = decode(received)
            dtype = sum_dtype(arrived.dtype)
            shard = pool.take(shards[0].numel(), dtype, arrived.device)
            if self.group.size == 2:
                torch.add(decode(shards[self.group.rank]).to(dtype), arrived.to(dtype), out=shard)
            else:
                torch.sum(arrived.view(self.group.size, -1), 0, dtype=dtype, out=shard)
            pool.give_back(received)
            return shard

        return Started(handle, summed)


def _all_to_all(group: Group, sent: Tensor, splits: Tensor, received: Tensor, name: str) -> int:
    """Begin an all-to-all into given memory. Collective.

    Horovod's public form allocates its output. This one resizes an output of the wrong size without a word.
    """
    handle: int = mpi_ops._alltoall_async(
        bits(sent),
        splits,
        bits(received),
        torch.empty(group.size, dtype=torch.int32),
        name,
        group.process_set,
    )
    return handle


def _swap(group: Group, sent: Tensor, received: Tensor, name: str) -> int:
    """Begin to swap tensors of one size between the two ranks of a group. Collective."""
    splits = torch.zeros(2, dtype=torch.int32)
    splits[1 - group.rank] = sent.numel()
    return _all_to_all(group, sent, splits, received, name)


class NativeReduceScatter:
    """Reduce-scatter by Horovod's own operation; not for Gloo and not for bf16."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def start(self, wire: Tensor, decode: Callable[[Tensor], Tensor], name: str, pool: BufferPool) -> Started:
        """Begin as `AllToAllReduceScatter.start`. Collective."""
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
    """Choose the reduce-scatter of gradients.

    Args:
        path: "alltoall", "reducescatter" or "auto" (see the module).
        group: the ranks.
        device: type of the device the gradients are on.

    Raises:
        ValueError: an unknown path, or "reducescatter" in a job with Gloo, whichever backends Horovod has besides.
    """
    if path not in ("auto", "alltoall", "reducescatter"):
        raise ValueError(f"reduce_scatter={path!r} is not known; use 'auto', 'alltoall' or 'reducescatter'")
    on_nccl = device == "cuda" and bool(hvd.nccl_built())
    if path == "reducescatter" and hvd.gloo_enabled():
        raise ValueError(
            "reduce_scatter='reducescatter' is refused over Gloo: Horovod's implementation there was seen to return "
            "wrong sums without an error; use 'auto'"
        )
    if path == "reducescatter" or (path == "auto" and on_nccl and not hvd.gloo_enabled()):
        return NativeReduceScatter(group)
    return AllToAllReduceScatter(group)


# Horovod joins all-gathers of one dtype that are asked for together, and then copies everything into a buffer and out
# of it again. These all move as they are over MPI, Gloo and NCCL, so neighbouring buckets travel as different ones.
_MOVED_AS = (torch.float32, torch.int32, torch.float16, torch.uint8, torch.int64, torch.float64, torch.int8)


def start_all_gather(
    group: Group, shard: Tensor, bucket: Tensor, name: str, number: int, pool: BufferPool
) -> Started:
    """Begin to all-gather a bucket (1-D, world_size shards) in place. Collective.

    Args:
        group: the ranks.
        shard: what goes into this rank's part, converted to the dtype of `bucket`; may be that part itself.
        bucket: the result; must not be written until the end.
        name: of the bucket, the same on all ranks.
        number: of the bucket among those that are started together, the same on all ranks.
        pool: for a copy of the shard, which MPI wants apart from the result of an all-gather.
    """
    assert bucket.is_contiguous()
    assert bucket.numel() == shard.numel() * group.size
    name = f"{group.name}.allgather.{name}"
    if group.size == 2:
        parts = bucket.view(2, -1)
        if parts[group.rank].data_ptr() != shard.data_ptr():
            parts[group.rank].copy_(shard)
        return Started(_swap(group, parts[group.rank], parts[1 - group.rank], name), lambda _: bucket)
    outgoing = pool.take(shard.numel(), bucket.dtype, bucket.device)
    outgoing.copy_(shard)
    moved_as = _MOVED_AS[number % len(_MOVED_AS)]
    handle = mpi_ops._allgather_async(outgoing.view(moved_as), bucket.view(moved_as), name, group.process_set)

    def filled(_: Any) -> Tensor:
        pool.give_back(outgoing)
        return bucket

    return Started(handle, filled)
