"""Put torch's DistributedDataParallel behind the `Engine` interface."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arsg_dist.engine import Communicator, LocalEngine


class DDPEngine(LocalEngine):
    """Replicate model and optimizer; average gradients during the backward pass.

    Args:
        module: the model, on this rank's device; rank 0's weights and buffers are broadcast. Buffers (batch norm's
            statistics) are each rank's own from then on, as under the other engines.
        optimizer: over the model's parameters.
        communicator: from `connect_torch`.
        accumulation_steps: micro-batches per update and rank; gradients travel in the last of them only.
        clip_grad_norm: the averaged gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
        skip_nonfinite: leave out updates whose gradient is not finite; under loss scaling they are in any case.
        distribution: further keyword arguments of `DistributedDataParallel`, such as `bucket_cap_mb` or
            `find_unused_parameters`.
    """

    kind = "ddp"

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
        super().__init__(
            module,
            optimizer,
            communicator,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            loss_scaling=loss_scaling,
            skip_nonfinite=skip_nonfinite,
        )
        on_gpu = [self.device] if self.device.type == "cuda" else None
        distribution = {"gradient_as_bucket_view": True, **distribution}
        self._parallel = DistributedDataParallel(
            module, device_ids=on_gpu, forward_sync_buffers=False, **distribution
        )
        self.module = self._parallel
        self._announce_micro_batch()

    def _announce_micro_batch(self) -> None:
        """Exchange gradients in the last micro-batch only."""
        self._parallel.require_backward_grad_sync = self._ends_update
