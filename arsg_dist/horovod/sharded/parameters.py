"""Own the parameters of a sharded optimizer: partitions, groups and names."""

import functools
import weakref
from collections.abc import Callable, Sequence

from torch import Tensor

from arsg_dist.horovod.comm.process_groups import ShardGroups
from arsg_dist.horovod.comm.verification import check_exchanges
from arsg_dist.horovod.sharded.arguments import sharded_by
from arsg_dist.horovod.sharded.buckets import Layout, ParameterSpec, Segment, plan
from arsg_dist.horovod.sharded.gather import GatherMode, PendingGather, WatchedList
from arsg_dist.horovod.sharded.gradients import Reduction
from arsg_dist.horovod.sharded.inner_optimizer import InnerOptimizer
from arsg_dist.horovod.sharded.layout_check import compare_ranks, described_layouts, described_optimizer
from arsg_dist.horovod.sharded.partition import Partition


class ShardedParameters:
    """Divide parameters, masters and gradients; a part of `ShardedOptimizer`.

    Args:
        groups: the ranks.
        reduction_between: how gradients are reduced between given ranks.
        bucket_bytes: largest size of a bucket.
        passes: backward passes per update.
        gather: whether readers of parameters wait, or an update.

    Attributes:
        groups: the ranks there are now.
        reduction: how they reduce gradients.
        passes: backward passes per update.
        trained: (name, parameter) of what is divided, part by part as it was added.
        frozen: (name, parameter) of what is not, since it needs no gradient.
        partitions: of each part its flat memory, and which part of it this rank owns; none before there is a layout.
        pending: the all-gathers under way.
    """

    def __init__(
        self,
        groups: ShardGroups,
        reduction_between: Callable[[ShardGroups], Reduction],
        bucket_bytes: int,
        passes: int,
        gather: GatherMode,
    ) -> None:
        self._reduction_between, self._bucket_bytes = reduction_between, bucket_bytes
        self.regroup(groups)
        self.passes = passes
        self.trained: list[list[tuple[str, Tensor]]] = []
        self.frozen: list[tuple[str, Tensor]] = []
        self.partitions: list[Partition] = []
        self.pending = PendingGather(gather)

    @property
    def names(self) -> dict[Tensor, str]:
        """Parameter → name, of all."""
        return {parameter: name for part in (*self.trained, self.frozen) for name, parameter in part}

    @property
    def specs(self) -> list[ParameterSpec]:
        """Of all parameters that are divided."""
        return [spec for partition in self.partitions for spec in partition.layout.parameters]

    @property
    def pieces(self) -> list[tuple[ParameterSpec, Segment, Tensor]]:
        """What this rank owns: its parameter, its place in that and its memory."""
        return [
            (partition.layout.parameters[segment.parameter], segment, piece)
            for partition in self.partitions
            for segment, piece in partition.pieces
        ]

    def pieces_of_group(self, group: int) -> list[Tensor]:
        """List what this rank owns of a parameter group's parameters."""
        return [piece for partition in self.partitions for piece in partition.pieces_of_group(group)]

    # Layout

    def add(self, named: Sequence[tuple[str, Tensor]], inner: InnerOptimizer) -> None:
        """Include further parameters, or none if that fails. Collective unless elastic.

        Args:
            named: (name, parameter), in the order of the model.
            inner: the optimizer, with their groups.
        """
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.trained.append(trained)
        try:
            if not self.groups.elastic:
                self.lay_out(inner)
        except BaseException:
            self.trained.pop()
            raise
        self.frozen += [(name, parameter) for name, parameter in named if not parameter.requires_grad]
        for _, parameter in trained:
            sharded_by[parameter] = weakref.ref(self)
        for group in inner.groups:
            if not isinstance(group["params"], WatchedList):
                group["params"] = WatchedList(group["params"], self.pending.wait)
        self._started_equal = False

    def lay_out(self, inner: InnerOptimizer) -> None:
        """Lay out what is not yet, check collectives, partition the state. Collective.

        Args:
            inner: the optimizer, whose state for these parameters is taken over.

        Raises:
            ValueError: the ranks have different parameters, arguments, settings or state.
            JobError: another rank raised it.
            RuntimeError: the exchanges return wrong data here.
        """
        first = len(self.partitions)
        parts = self.trained[first:]
        layouts = [
            plan(
                [ParameterSpec.of(name, parameter) for name, parameter in part],
                self.groups.shard.size,
                self._bucket_bytes,
            )
            for part in parts
        ]
        group_of = {
            id(parameter): index for index, group in enumerate(inner.groups) for parameter in group["params"]
        }
        groups_of = [[group_of[id(parameter)] for _, parameter in part] for part in parts]
        described = described_layouts(layouts, groups_of, self.passes, self.reduction)
        # In an elastic job all ranks load the rest next, and one that has just joined has settings of its own until
        # then.
        if not self.groups.elastic:
            described |= described_optimizer(inner)
        compare_ranks(self.groups.world, described)
        for number, (part, layout, groups) in enumerate(zip(parts, layouts, groups_of, strict=True), first):
            parameters = [parameter for _, parameter in part]
            if layout.buckets:
                self._check_exchanges(layout, parameters[0])
            # A parameter frozen since it was first laid out takes no hook otherwise.
            frozen = [parameter for parameter in parameters if not parameter.requires_grad]
            for parameter in frozen:
                parameter.requires_grad_(True)
            partition = Partition(
                layout,
                parameters,
                groups,
                self.groups,
                self.reduction,
                self.passes,
                functools.partial(_unscale, weakref.ref(self)),
                self.pending,
                label=f"part{number}",
            )
            for parameter in frozen:
                parameter.requires_grad_(False)
            self.partitions.append(partition)
            inner.adopt(partition)

    def _check_exchanges(self, layout: Layout, parameter: Tensor) -> None:
        sizes = {
            (bucket.numel, layout.arenas[bucket.arena][0], parameter.device): None
            for bucket in layout.buckets
        }
        check_exchanges(self.groups.shard, self.reduction.reduce_scatter.exchange, list(sizes))

    def require_layout(self, what: str) -> None:
        """Raise RuntimeError where the parameters are not divided yet, in an elastic job."""
        if not self.partitions:
            raise RuntimeError(
                f"{what} of a ShardedOptimizer in an elastic job works inside the function that "
                "arsg_dist.horovod.elastic.run decorates, after elastic.TorchState(model=..., optimizer=...): only "
                "there are the ranks known. Load the model and the plain optimizer before wrapping it, or load "
                "inside that function"
            )

    def abandon(self) -> None:
        """Forget the layout without a message to other ranks, which may be dead.

        The parameters may hold anything if exchanges were under way.
        """
        self.pending.abandon()
        for partition in self.partitions:
            partition.abandon()
        self.partitions.clear()

    def regroup(self, groups: ShardGroups) -> None:
        """Take other ranks, before anything is laid out."""
        self.groups, self.reduction = groups, self._reduction_between(groups)
        self._started_equal = False

    def close(self) -> None:
        """Take the hooks off the parameters and their modules."""
        self.pending.close()
        for partition in self.partitions:
            partition.gradients.remove()
            for parameter in partition.parameters:
                sharded_by.pop(parameter, None)  # type: ignore[no-untyped-call]

    # Gradients

    @property
    def in_update(self) -> bool:
        """Whether some gradient of an update has been counted that is not yet finished."""
        return any(partition.gradients.under_way for partition in self.partitions)

    def refuse_in_update(self, what: str) -> None:
        """Raise RuntimeError between a backward pass and `step`, or without a layout."""
        self.require_layout(what)
        if any(p.gradients.under_way and not p.gradients.synchronized for p in self.partitions):
            raise RuntimeError(f"{what} after backward() and before step()")

    def take_gradients_back(self) -> None:
        """Free the gradients of this update."""
        for partition in self.partitions:
            partition.take_gradients_back()

    # Masters and parameters

    def update_masters(self) -> None:
        """Take over into the masters what was written into the parameters. Collective."""
        self.pending.wait()
        thawed = [name for name, parameter in self.frozen if parameter.requires_grad]
        if thawed:
            raise RuntimeError(
                f"{', '.join(thawed)} had requires_grad=False when ShardedOptimizer was made and has no shard: let it "
                "require gradients then (and switch it off and on afterwards), or add it later with add_param_group"
            )
        for partition in self.partitions:
            partition.adopt_parameters()
        if not self._started_equal:
            sums = self.groups.world.all_gather_object([p.checksums() for p in self.partitions], "parameters")
            if any(other != sums[0] for other in sums):
                raise RuntimeError(
                    "the ranks start with different parameters: call "
                    "hvd.broadcast_parameters(model.state_dict(), root_rank=0) before the first step"
                )
            self._started_equal = True

    def publish_masters(self) -> None:
        """All-gather the masters into the parameters, and wait. Collective."""
        self.pending.wait()
        for partition in self.partitions:
            partition.start_gather()
        self.pending.wait()


def _unscale(owner: "weakref.ref[ShardedParameters]", found_inf: Tensor, inv_scale: Tensor) -> None:
    """Unscale every partition's gradients, whichever GradScaler met. Collective."""
    shards = owner()
    assert shards is not None, "GradScaler was given its optimizer"
    for partition in shards.partitions:
        partition.gradients.unscale(found_inf, inv_scale)
