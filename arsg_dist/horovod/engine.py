"""Put Horovod behind the `Engine` interface, replicated and sharded."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from arsg_dist.engine import Communicator, EngineState, LocalEngine, SavedState
from arsg_dist.horovod.broadcast import broadcast_parameters
from arsg_dist.horovod.replicated.optimizer import DistributedOptimizer
from arsg_dist.horovod.sharded.checkpoint import load_sharded, sharded_engine_state
from arsg_dist.horovod.sharded.optimizer import ShardedOptimizer


class HorovodEngine(LocalEngine):
    """Train replicated: every rank holds model and optimizer.

    Horovod averages the gradients while they are computed.

    Subclasses distribute the optimizer in another way.

    Args:
        module: the model, on this rank's device; rank 0's weights are broadcast.
        optimizer: over the model's parameters.
        communicator: from `connect`.
        accumulation_steps: micro-batches per update and rank.
        clip_grad_norm: the averaged gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
        skip_nonfinite: leave out updates whose gradient is not finite; under loss scaling they are in any case.
        distribution: further keyword arguments of `DistributedOptimizer`, such as `compression`.
    """

    kind = "horovod"
    _distribute: Callable[..., torch.optim.Optimizer] = staticmethod(DistributedOptimizer)

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
        **distribution: Any,
    ) -> None:
        broadcast_parameters(module.state_dict())
        distributed = self._distribute(
            optimizer,
            named_parameters=module.named_parameters(),
            backward_passes_per_step=accumulation_steps,
            **distribution,
        )
        super().__init__(
            module,
            distributed,
            communicator,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            loss_scaling=loss_scaling,
            skip_nonfinite=skip_nonfinite,
        )

    def _update(self) -> None:
        if not (self._clip_grad_norm or self._grad_scaler.is_enabled() or self._skip_nonfinite):
            self.optimizer.step()
            return
        # Clip the average, and look for overflow in it: not in this rank's part.
        self.optimizer.synchronize()  # type: ignore[attr-defined]
        with self.optimizer.skip_synchronize():  # type: ignore[attr-defined]
            super()._update()

    def _start_comparison(self) -> Callable[[], None]:
        """Leave it to the optimizer, which has compared while the gradients travelled."""
        return lambda: None


class HorovodShardedEngine(HorovodEngine):
    """Train with optimizer state and fp32 masters divided among the ranks.

    Every rank holds the model.

    Arguments as of `HorovodEngine`, the further ones of `ShardedOptimizer`, such as `bucket_mb`.
    """

    kind = "horovod-sharded"
    optimizer: ShardedOptimizer
    _distribute = staticmethod(ShardedOptimizer)

    def _gradient_is_finite(self) -> bool:
        return self.optimizer.gradient_is_finite()

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters."""
        self.optimizer.synchronize_parameters()
        yield from self.module.named_parameters()

    def check_next_sums(self) -> None:
        """Have every bucket's sum computed by the next rank too. Collective."""
        self.optimizer.check_sums(True)

    def faulty_sums(self) -> list[str]:
        """Name the buckets whose two sums differ. Collective."""
        self.optimizer.check_sums(False)
        return self.optimizer.faulty_sums()

    def _clip(self) -> None:
        if self._clip_grad_norm:
            self.optimizer.synchronize()
            self._grad_scaler.unscale_(self.optimizer)
            self.optimizer.clip_grad_norm_(self._clip_grad_norm)

    def _own_state(self) -> EngineState:
        return sharded_engine_state(
            self.module, self.optimizer, self.communicator.rank, self.communicator.world_size
        )

    def load_state(self, saved: SavedState) -> None:
        """Read the pieces that this rank owns. Collective."""
        super().load_state(saved)
        self.optimizer.shards.publish_masters()

    def _load_own_state(self, saved: SavedState) -> None:
        load_sharded(self.module, self.optimizer, saved)
