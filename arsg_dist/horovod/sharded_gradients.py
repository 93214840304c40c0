"""The gradients of a ShardedOptimizer, between backward pass and update."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from arsg_dist.engine import all_finite
from arsg_dist.horovod import sharded_arguments
from arsg_dist.horovod.clipping import clip_shards
from arsg_dist.horovod.shards import Shards


class ShardedGradients(Shards):
    """What a ShardedOptimizer lets its user do with gradients."""

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes how many backward passes make an update.

        Raises:
            ValueError: not an integer > 0.
            RuntimeError: some backward passes of an update are done.
        """
        sharded_arguments.check_passes(passes)
        if any(partition.gradients.under_way for partition in self._partitions):
            raise RuntimeError(
                "set_backward_passes_per_step() is for between updates: after step(), before backward()"
            )
        self.backward_passes_per_step = passes
        for partition in self._partitions:
            partition.gradients.passes = passes

    def synchronize(self) -> None:
        """Waits until this rank has its part of every gradient, reduced over all ranks."""
        self._require_layout("synchronize()")
        for partition in self._partitions:
            partition.gradients.synchronize()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Horovod's way to say that `synchronize()` was called before `step()`; not needed here."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, also those of an update that was synchronized and then not made.

        Args:
            set_to_none: False fills `.grad` with zeros, which costs the memory of all gradients.

        Raises:
            RuntimeError: after a backward pass and before `synchronize()` or `step()`.
        """
        for partition in self._partitions:
            if partition.gradients.under_way and not partition.gradients.synchronized:
                raise RuntimeError(
                    "zero_grad() after backward() and before step(): other ranks already add up these gradients; to "
                    "throw an update away call synchronize() first, on every rank"
                )
            partition.take_gradients_back()
        # Not by way of `param_groups`, which would wait for the parameters of the last update.
        for named in (*self._trained, self._frozen):
            for _, parameter in named:
                parameter.grad = None if set_to_none else torch.zeros_like(parameter)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        parameters: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Scales the reduced gradients down to a norm, as `torch.nn.utils.clip_grad_norm_`; every rank calls it.

        Args:
            max_norm: largest norm over all parameters.
            norm_type: 2 or inf, or another p ≥ 1.
            error_if_nonfinite: raise if the norm is not finite.
            parameters: clip these only.

        Returns:
            The norm before clipping, a 0-dim tensor, the same on all ranks.

        Raises:
            RuntimeError: the norm is not finite, and that is an error.
        """
        self.synchronize()
        return clip_shards(
            self._partitions,
            self._groups.shard,
            max_norm,
            norm_type,
            error_if_nonfinite=error_if_nonfinite,
            parameters=parameters,
        )

    def gradient_is_finite(self) -> bool:
        """Whether the reduced gradient is finite in every element, the same on all ranks; every rank calls it."""
        self.synchronize()
        shards = [shard for p in self._partitions for shard in p.gradients.shards if shard is not None]
        bad = torch.tensor([float(not all_finite(shards))])
        return not self._groups.shard.max(bad, "nonfinite").item()

    def check_sums(self, on: bool) -> None:
        """Whether gradients are summed up twice from the next backward pass on (`second_sum`); on all ranks alike."""
        self._exchange.reduce_scatter.checking = on

    def faulty_sums(self) -> list[str]:
        """What `check_sums` has found since the last call, the same on every rank; every rank calls it."""
        return self._exchange.reduce_scatter.faults()
