"""Some parameters of a model, sharded: their memory, their masters, their gradients and the way back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from arsg_dist.horovod.buckets import Layout, Segment
from arsg_dist.horovod.buffer_pool import BufferPool
from arsg_dist.horovod.exchange import sum_dtype
from arsg_dist.horovod.gradient_buckets import GradientBuckets, Unscale
from arsg_dist.horovod.group import Group
from arsg_dist.horovod.parameter_gather import ParameterGather, PendingGather, take_over
from arsg_dist.horovod.second_sum import CheckedReduceScatter
from arsg_dist.horovod.sharded_arguments import in_elastic_job


@dataclass(frozen=True)
class ShardGroups:
    """Between which ranks the shards are cut, and who else holds the same shard.

    Attributes:
        shard: the ranks that share one set of shards.
        replicas: the ranks that own the same shard in other such groups, or None.
        world: all ranks that train together; world.size = shard.size × replicas.size.
    """

    shard: Group
    replicas: Group | None
    world: Group


@dataclass(frozen=True)
class Exchange:
    """How gradients and parameters travel.

    Attributes:
        reduce_scatter: of gradients.
        compression: Horovod's compressor, for gradients.
        prescale: factor of gradients before the sum over the ranks.
        postscale: factor after it.
        sparse_as_dense: accept sparse gradients.
    """

    reduce_scatter: CheckedReduceScatter
    compression: Any
    prescale: float
    postscale: float
    sparse_as_dense: bool


class Partition:
    """Trainable parameters in flat memory, of which this rank owns a part.

    Args:
        layout: of the parameters.
        parameters: as in the layout; their memory is moved into the arenas.
        group_of: each parameter's index in the optimizer's `param_groups`.
        groups: the ranks.
        exchange: settings.
        passes: backward passes per update.
        unscale: serves torch's GradScaler.
        pending: makes readers of the parameters wait.
        label: distinguishes the exchanges of this partition from those of others.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Sequence[Tensor],
        group_of: Sequence[int],
        groups: ShardGroups,
        exchange: Exchange,
        passes: int,
        unscale: Unscale,
        pending: PendingGather,
        label: str,
    ) -> None:
        take_over(parameters)
        self.layout, self.parameters, self.group_of = layout, list(parameters), list(group_of)
        self.rank = groups.shard.rank
        devices = {layout.arena_of[index]: p.device for index, p in enumerate(parameters)}
        self.arenas = [
            torch.zeros(numel, dtype=dtype, device=devices[index])
            for index, (dtype, _, numel) in enumerate(layout.arenas)
        ]
        self._homes = []
        for index, parameter in enumerate(parameters):
            spec = layout.parameters[index]
            flat = self.arenas[layout.arena_of[index]].narrow(0, layout.offsets[index], spec.numel)
            flat.copy_(spec.flat(parameter.detach()))
            parameter.data = spec.shaped(flat) if spec.numel else parameter.data
            self._homes.append((parameter.data_ptr(), parameter.stride()))
        pool = BufferPool()
        self.gather = ParameterGather(layout, parameters, self.arenas, groups.shard, pending, pool, label)
        self.gradients = GradientBuckets(
            layout,
            parameters,
            groups.shard,
            groups.replicas,
            exchange.reduce_scatter,
            compression=exchange.compression,
            passes=passes,
            unscale=unscale,
            prescale=exchange.prescale,
            postscale=exchange.postscale,
            sparse_as_dense=exchange.sparse_as_dense,
            pool=pool,
            label=label,
        )
        self.masters = [
            self._owned(bucket).to(sum_dtype(self._owned(bucket).dtype))
            for bucket in range(len(layout.buckets))
        ]
        """This rank's part of every bucket, in fp32 (fp64 for fp64): what the optimizer updates.

        The parameters' own memory where they have that dtype.
        """
        self.pieces: list[tuple[Segment, Tensor]] = [
            (segment, self.masters[segment.bucket].narrow(0, segment.start, segment.numel))
            for segment in layout.pieces(self.rank)
        ]
        """What this rank owns of each parameter: its place and its memory in `masters`."""

    def _owned(self, bucket: int) -> Tensor:
        size = self.layout.buckets[bucket].shard_numel
        return self.gather.bucket(bucket).narrow(0, self.rank * size, size)

    def pieces_of_group(self, group: int) -> list[Tensor]:
        """What stands for a parameter group's parameters in the inner optimizer."""
        return [piece for segment, piece in self.pieces if self.group_of[segment.parameter] == group]

    def adopt_parameters(self) -> None:
        """Takes over into the masters what has been written into the parameters since they were gathered.

        So parameters may be loaded, broadcast, clamped or averaged in place at any time, as with an optimizer that is
        not sharded. Elements of half precision that nobody wrote keep their master's precision.

        Raises:
            RuntimeError: the memory of a parameter was replaced.
        """
        for index, parameter in enumerate(self.parameters):
            if (parameter.data_ptr(), parameter.stride()) != self._homes[index] or (
                parameter.dtype != self.layout.parameters[index].dtype
            ):
                raise RuntimeError(
                    f"the memory of {self.layout.parameters[index].name} was replaced (by model.to(), half(), "
                    "load_state_dict(assign=True) or an assignment to .data) after ShardedOptimizer laid it out: do "
                    "this before, or write in place (parameter.copy_(...))"
                )
        for bucket, master in enumerate(self.masters):
            written = self._owned(bucket)
            if written.dtype != master.dtype:
                untouched = master.to(written.dtype) == written
                master.copy_(torch.where(untouched, master, written.to(master.dtype)))

    def hand_out_gradients(self) -> None:
        """Gives every piece the gradient of its elements; those of frozen parameters None."""
        for segment, piece in self.pieces:
            if self.parameters[segment.parameter].requires_grad:
                shard = self.gradients.shard(segment.bucket).narrow(0, segment.start, segment.numel)
                piece.grad = shard.to(piece.dtype)

    def take_gradients_back(self) -> None:
        """Frees the gradients of this update."""
        for _, piece in self.pieces:
            piece.grad = None
        self.gradients.reset()

    def start_gather(self) -> None:
        """Begins to send the masters into the parameters of all ranks."""
        self.gather.start(self.masters)

    def checksums(self) -> list[int]:
        """One number per arena, which differs if any element does."""
        return [int(_checksum(arena)) for arena in self.arenas]

    def abandon(self) -> None:
        """Takes the hooks off the parameters without a message to other ranks, which may be dead.

        Parameters move out of the flat memory, into which exchanges under way may still write. What is in them then
        is of no use if there were any.
        """
        self.gradients.abandon()
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None
            spec = self.layout.parameters[index]
            if spec.numel and parameter.data_ptr() == self._homes[index][0]:
                parameter.data = spec.shaped(spec.flat(parameter.detach()).clone())


def pieces_of_group(partitions: Iterable[Partition], group: int) -> list[Tensor]:
    """What this rank owns of a parameter group's parameters, over all partitions."""
    return [piece for partition in partitions for piece in partition.pieces_of_group(group)]


def _checksum(arena: Tensor) -> Tensor:
    words = arena.view(torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=arena.device)
    for part in torch.split(words, 1 << 22):  # as int64 a piece at a time
        weights = torch.arange(1, part.numel() + 1, device=arena.device)
        total = total * 31 + (part.to(torch.int64) * weights).sum()
    return total


_PROCESS_SETS: dict[tuple[int, ...], Any] = {}


def shard_groups(shard_group: str | int, process_set: Any, label: str) -> ShardGroups:
    """Makes the groups of ranks. Collective, except in an elastic job, where all ranks share the shards.

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
        return ShardGroups(world, None, world)
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
