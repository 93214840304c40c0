"""Horovod with sharded optimizer state behind the common `Engine` interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from arsg_dist.engine import Communicator, EngineState, SavedState, SingleProcessEngine
from arsg_dist.horovod.broadcast import broadcast_parameters
from arsg_dist.horovod.sharded import ShardedOptimizer
from arsg_dist.horovod.sharded_checkpoint import load_sharded, sharded_engine_state


class HorovodShardedEngine(SingleProcessEngine):
    """Every rank holds the model; optimizer state and fp32 masters are divided among the ranks.

    Args:
        module: the model, on this rank's device; rank 0's weights are broadcast.
        optimizer: over the model's parameters.
        communicator: from `connect`.
        accumulation_steps: micro-batches per update and rank.
        clip_grad_norm: the averaged gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
        skip_nonfinite: leave out updates whose gradient is not finite; under loss scaling they are in any case.
        sharding: further keyword arguments of `ShardedOptimizer`, such as `bucket_mb`.
    """

    kind = "horovod-sharded"
    optimizer: ShardedOptimizer

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        *,
        accumulation_steps: int = 1,
        clip_grad_norm: float = 0.0,
        loss_scaling: bool = False,
        skip_nonfinite: bool = False,
        **sharding: Any,
    ) -> None:
        broadcast_parameters(module.state_dict())
        sharded = ShardedOptimizer(
            optimizer,
            named_parameters=module.named_parameters(),
            backward_passes_per_step=accumulation_steps,
            **sharding,
        )
        super().__init__(
            module,
            sharded,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            loss_scaling=loss_scaling,
            skip_nonfinite=skip_nonfinite,
        )
        self.communicator = communicator

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Moves the parameters to θ and back on all ranks."""
        self._refuse_at_base_iterate("base_iterate")
        with self.optimizer.base_iterate():
            self._at_base_iterate = True
            try:
                yield
            finally:
                self._at_base_iterate = False

    def _gradient_is_finite(self) -> bool:
        return self.optimizer.gradient_is_finite()

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters."""
        self.optimizer.synchronize_parameters()
        yield from self.module.named_parameters()

    def check_next_sums(self) -> None:
        """Every bucket's sum is computed by the next rank too, from the same gradients."""
        self.optimizer.check_sums(True)

    def faulty_sums(self) -> list[str]:
        """The buckets whose two sums differ."""
        self.optimizer.check_sums(False)
        return self.optimizer.faulty_sums()

    def _clip(self) -> None:
        if self._clip_grad_norm:
            self.optimizer.synchronize()
            self._grad_scaler.unscale_(self.optimizer)
            self.optimizer.clip_grad_norm_(self._clip_grad_norm)

    def state(self) -> EngineState:
        """This rank's shards; of what every rank holds alike, its share."""
        self._refuse_at_base_iterate("state")
        state = sharded_engine_state(
            self.module, self.optimizer, self.communicator.rank, self.communicator.world_size
        )
        state.loss_scale = self._loss_scale()
        return state

    def load_state(self, saved: SavedState) -> None:
        """Every rank reads the pieces it owns."""
        self._refuse_at_base_iterate("load_state")
        with self.communicator.fail_together():
            load_sharded(self.module, self.optimizer, saved)
        self.optimizer.publish_masters()
        self._load_loss_scale(saved)
