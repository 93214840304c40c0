"""Reduce-scatter gradients while a backward pass computes them."""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from arsg_dist.horovod.comm.collectives import BufferPool, Started
from arsg_dist.horovod.comm.process_groups import Group, ShardGroups
from arsg_dist.horovod.comm.verification import CheckedReduceScatter
from arsg_dist.horovod.sharded.buckets import Layout

Unscale = Callable[[Tensor, Tensor], None]
"""Given (found_inf, inv_scale) it multiplies all reduced gradients by inv_scale, and sets found_inf if one is bad."""


@dataclass(frozen=True)
class Reduction:
    """Say how gradients are reduced.

    Attributes:
        reduce_scatter: the collective.
        compression: Horovod's compressor.
        prescale: factor of gradients before the sum over the ranks.
        postscale: factor after it.
        sparse_as_dense: accept sparse gradients and make them dense.
    """

    reduce_scatter: CheckedReduceScatter
    compression: Any
    prescale: float
    postscale: float
    sparse_as_dense: bool


class ReleasedGradient(Tensor):
    """Stand in a parameter's `.grad` once the gradient is on its way to its owner.

    It has no memory and no values.

    Whatever computes with it raises, where zeros or None would silently do nothing (torch's `clip_grad_norm_`) or be
    logged as a gradient of zero. The one operation it knows is what `torch.amp.GradScaler` does with gradients: that
    unscales the shards.
    """

    _unscale: Unscale

    @staticmethod
    def __new__(cls, parameter: Tensor, unscale: Unscale) -> "ReleasedGradient":
        """Make a placeholder of a parameter's shape; `unscale` serves GradScaler."""
        placeholder: ReleasedGradient = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, parameter.shape, strides=parameter.stride(), dtype=parameter.dtype, device=parameter.device
        )
        placeholder._unscale = unscale
        return placeholder

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ReleasedGradient(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse everything but GradScaler's operation."""
        if func is torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default:
            # Once per device and dtype, with the gradients of every partition: one placeholder speaks for all.
            gradients, found_inf, inv_scale = args
            next(g for g in gradients if isinstance(g, cls))._unscale(found_inf, inv_scale)
            return None
        raise RuntimeError(
            f"{func} on a gradient that a ShardedOptimizer has already handed to its owner. To clip use "
            "optimizer.clip_grad_norm_(max_norm) in place of torch's clip_grad_norm_; before the next backward pass "
            "call optimizer.zero_grad()"
        )


class GradientBuckets:
    """Collect gradients in buckets, and reduce-scatter each once full.

    A bucket is exchanged once per update: when the last of its parameters has seen `passes` backward passes, or in
    `synchronize`, where parameters that saw none contribute zeros. Horovod carries an operation out when every rank
    has asked for it by name, so ranks that use different parameters, or finish them in another order, do not block
    each other.

    Args:
        layout: of the parameters.
        parameters: as in the layout.
        groups: the ranks.
        reduction: how they reduce.
        passes: backward passes per update.
        unscale: of all gradients of the optimizer, for GradScaler.
        pool: memory of buckets and shards.
        label: precedes the names of buckets.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Sequence[Tensor],
        groups: ShardGroups,
        reduction: Reduction,
        passes: int,
        unscale: Unscale,
        pool: BufferPool,
        label: str,
    ) -> None:
        self.label, self._pool, self._unscale_all = label, pool, unscale
        self.layout, self.parameters, self.groups = layout, parameters, groups
        self.reduction, self.passes = reduction, passes
        self.shards: list[Tensor | None] = [None] * len(layout.buckets)
        """Once `synchronized`: this rank's part of every bucket's gradient, in fp32 (fp64 for fp64)."""
        self.synchronized = False
        self._segments = [layout.segments_of_parameter(index) for index in range(len(parameters))]
        device_of = {segment.bucket: parameters[segment.parameter].device for segment in layout.segments}
        self._gaps = [
            torch.cat(
                [torch.empty(0, dtype=torch.int64), *(torch.arange(*gap) for gap in layout.gaps(bucket))]
            ).to(device_of[bucket])
            for bucket in range(len(layout.buckets))
        ]
        """Of every bucket the places that no parameter has."""
        self._flat: dict[int, Tensor] = {}
        self._sent: dict[int, Tensor] = {}
        self._started: dict[int, Started] = {}
        self._found_inf: Tensor | None = None
        self._reset_counts()
        me = weakref.ref(self)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                functools.partial(_gradient_is_ready, me, index)
            )
            for index, parameter in enumerate(parameters)
        ]
        weakref.finalize(self, _take_off, self._hooks).atexit = False

    def _reset_counts(self) -> None:
        for flat in self._flat.values():
            self._pool.give_back(flat)
        self._flat = {}
        self._seen = [0] * len(self.parameters)
        self._missing = [0] * len(self.layout.buckets)
        for segment in self.layout.segments:
            self._missing[segment.bucket] += 1

    @property
    def under_way(self) -> bool:
        """Whether some gradient of an update has been counted that is not yet finished."""
        return any(self._seen) or bool(self._started) or self.synchronized

    def reset(self) -> None:
        """Forget the gradients of this update.

        Waits for exchanges under way, since the other ranks take part.
        """
        for bucket in list(self._started):
            self._finish(bucket)
        for shard in self.shards:
            if shard is not None:
                self._pool.give_back(shard)
        self.shards = [None] * len(self.layout.buckets)
        self.synchronized = False
        self._found_inf = None
        self._reset_counts()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        _take_off(self._hooks)

    def abandon(self) -> None:
        """Take the hooks off, and wait for nothing."""
        self.remove()
        self._started = {}

    def gradient_is_ready(self, index: int) -> None:
        """Count a backward pass of a parameter and take over its gradient after the last."""
        if self.synchronized or self._seen[index] >= self.passes:
            raise RuntimeError(
                f"{self.layout.parameters[index].name}: gradients were computed more than backward_passes_per_step = "
                f"{self.passes} times before step(); set backward_passes_per_step to the number of backward passes, "
                "or, if a step was skipped, call zero_grad() first"
            )
        self._seen[index] += 1
        if self._seen[index] == self.passes:
            self._take(index)
            for bucket in {segment.bucket for segment in self._segments[index]}:
                if self._missing[bucket] == 0:
                    self._start(bucket)
            for bucket in [number for number, started in self._started.items() if started.done()]:
                self._finish(bucket)

    def _take(self, index: int) -> None:
        parameter, spec = self.parameters[index], self.layout.parameters[index]
        gradient = parameter.grad
        if isinstance(gradient, ReleasedGradient):
            gradient = None  # left over from an update in which it was used
        if gradient is not None:
            if gradient.is_sparse and self.reduction.sparse_as_dense:
                gradient = gradient.to_dense()
            if gradient.layout != torch.strided:
                raise RuntimeError(
                    f"{spec.name} has a sparse gradient, which cannot be sharded: make its layer dense "
                    "(nn.Embedding(sparse=False)), or give sparse_as_dense=True"
                )
            gradient = spec.flat(gradient.detach())
        for segment in self._segments[index]:
            if segment.bucket not in self._flat:
                numel = self.layout.buckets[segment.bucket].numel
                self._flat[segment.bucket] = flat = self._pool.take(numel, parameter.dtype, parameter.device)
                flat.index_fill_(0, self._gaps[segment.bucket], 0)  # gaps must not look like an overflow
            place = self._flat[segment.bucket].narrow(0, segment.start, segment.numel)
            if gradient is None:
                place.zero_()
            else:
                place.copy_(gradient.narrow(0, segment.parameter_start, segment.numel))
            self._missing[segment.bucket] -= 1
        parameter.grad = ReleasedGradient(parameter, self._unscale_all)

    def _start(self, bucket: int) -> None:
        self._sent[bucket] = flat = self._flat.pop(bucket)
        if self.reduction.prescale != 1.0:
            flat.mul_(self.reduction.prescale)
        wire, context = self.reduction.compression.compress(flat)
        decode = functools.partial(self.reduction.compression.decompress, ctx=context)
        self._started[bucket] = self.reduction.reduce_scatter.start(
            wire, decode, f"{self.label}.gradient{bucket}", self._pool
        )

    def _finish(self, bucket: int) -> None:
        self.shards[bucket] = shard = self._started.pop(bucket).finish()
        self._pool.give_back(self._sent.pop(bucket))
        if self.reduction.postscale != 1.0:
            shard.mul_(self.reduction.postscale)

    def synchronize(self) -> None:
        """Reduce what is left and wait for this rank's shard of every bucket. Collective."""
        if self.synchronized:
            return
        for index, seen in enumerate(self._seen):
            if seen < self.passes:
                self._seen[index] = self.passes
                self._take(index)
        for bucket in list(self._flat):
            self._start(bucket)
        for bucket in range(len(self.layout.buckets)):
            if bucket in self._started:
                self._finish(bucket)
        if self.groups.replicas is not None:
            self._add_replicas(self.groups.replicas)
        self.synchronized = True

    def _add_replicas(self, replicas: Group) -> None:
        handles = [
            hvd.allreduce_async_(
                shard,
                op=hvd.Sum,
                name=f"{replicas.name}.{self.label}.gradient{bucket}",
                process_set=replicas.process_set,
            )
            for bucket, shard in enumerate(self.shards)
        ]
        for handle in handles:
            hvd.synchronize(handle)

    def shard(self, bucket: int) -> Tensor:
        """Return this rank's part of a bucket's gradient, after `synchronize`."""
        shard = self.shards[bucket]
        assert shard is not None
        return shard

    def unscale(self, found_inf: Tensor, inv_scale: Tensor) -> None:
        """Unscale this rank's shards, once per update. Collective."""
        # GradScaler asks once per dtype of gradient, and looks at this rank's answer only.
        if self._found_inf is None:
            self.synchronize()
            mine = torch.zeros_like(found_inf)
            torch._amp_foreach_non_finite_check_and_unscale_(
                [shard for shard in self.shards if shard is not None], mine, inv_scale.to(mine.device)
            )
            self._found_inf = self.groups.shard.max(mine, "found_inf")
        found_inf.copy_(torch.maximum(found_inf, self._found_inf))


def _take_off(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _gradient_is_ready(owner: "weakref.ref[GradientBuckets]", index: int, parameter: Tensor) -> None:
    buckets = owner()
    if buckets is not None:
        buckets.gradient_is_ready(index)
