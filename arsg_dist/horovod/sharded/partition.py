"""Partition the flat memory of parameters over the ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from arsg_dist.engine.consistency import fingerprints
from arsg_dist.horovod.comm.collectives import BufferPool, sum_dtype
from arsg_dist.horovod.comm.process_groups import ShardGroups
from arsg_dist.horovod.sharded.buckets import Layout, Segment
from arsg_dist.horovod.sharded.gather import ParameterGather, PendingGather, take_over
from arsg_dist.horovod.sharded.gradients import GradientBuckets, Reduction, Unscale
from arsg_dist.optim.state import set_places


class Partition:
    """Hold parameters in flat memory, of which this rank owns a part.

    Args:
        layout: of the parameters.
        parameters: as in the layout; their memory is moved into the arenas.
        group_of: each parameter's index in the optimizer's `param_groups`.
        groups: the ranks.
        reduction: of gradients.
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
        reduction: Reduction,
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
        self.gradients = GradientBuckets(layout, parameters, groups, reduction, passes, unscale, pool, label)
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
        for segment, piece in self.pieces:
            set_places(piece, [(0, segment.numel, segment.parameter_start)])

    def _owned(self, bucket: int) -> Tensor:
        size = self.layout.buckets[bucket].shard_numel
        return self.gather.bucket(bucket).narrow(0, self.rank * size, size)

    def pieces_of_group(self, group: int) -> list[Tensor]:
        """List what stands for a parameter group's parameters in the inner optimizer."""
        return [piece for segment, piece in self.pieces if self.group_of[segment.parameter] == group]

    def adopt_parameters(self) -> None:
        """Take over into the masters what was written into the parameters meanwhile.

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
        """Give every piece the gradient of its elements; those of frozen parameters None."""
        for segment, piece in self.pieces:
            if self.parameters[segment.parameter].requires_grad:
                shard = self.gradients.shard(segment.bucket).narrow(0, segment.start, segment.numel)
                piece.grad = shard.to(piece.dtype)

    def take_gradients_back(self) -> None:
        """Free the gradients of this update."""
        for _, piece in self.pieces:
            piece.grad = None
        self.gradients.reset()

    def start_gather(self) -> None:
        """Begin to all-gather the masters into the parameters. Collective."""
        self.gather.start(self.masters)

    def checksums(self) -> list[int]:
        """Compute one number per arena, which differs if any element does."""
        return fingerprints(self.arenas)

    def abandon(self) -> None:
        """Take the hooks off the parameters without a message to other ranks, maybe dead.

        Parameters move out of the flat memory, into which exchanges under way may still write. What is in them then
        is of no use if there were any.
        """
        self.gradients.abandon()
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None
            spec = self.layout.parameters[index]
            if spec.numel and parameter.data_ptr() == self._homes[index][0]:
                parameter.data = spec.shaped(spec.flat(parameter.detach()).clone())
