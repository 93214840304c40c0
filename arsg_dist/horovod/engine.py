"""Horovod's replicated data parallelism behind the common `Engine` interface."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from arsg_dist.engine import Communicator, SingleProcessEngine
from arsg_dist.horovod.broadcast import broadcast_parameters
from arsg_dist.horovod.distributed import DistributedOptimizer


class HorovodEngine(SingleProcessEngine):
    """Every rank holds model and optimizer; Horovod averages the gradients while they are computed.

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
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            loss_scaling=loss_scaling,
            skip_nonfinite=skip_nonfinite,
        )
        self.communicator = communicator

    def _update(self) -> None:
        if not (self._clip_grad_norm or self._grad_scaler.is_enabled() or self._skip_nonfinite):
            self.optimizer.step()
            return
        # Clip the average, and look for overflow in it: not in this rank's part.
        self.optimizer.synchronize()  # type: ignore[attr-defined]
        with self.optimizer.skip_synchronize():  # type: ignore[attr-defined]
            super()._update()
