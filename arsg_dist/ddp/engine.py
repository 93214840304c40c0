"""Put torch's DistributedDataParallel behind the `Engine` interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arsg_dist.ddp.shards import Shards, load_sharded, sharded_state
from arsg_dist.engine import Communicator, EngineState, LocalEngine, SavedState
from arsg_dist.optim.by_name import ELEMENT_WISE


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
        shards: divide the update and the optimizer's state among the ranks; the optimizer is over their `groups`.
        distribution: further keyword arguments of `DistributedDataParallel`, such as `bucket_cap_mb` or
            `find_unused_parameters`.

    Raises:
        TypeError: the update is to be divided, and the optimizer is not known to update each element by itself.
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
        shards: Shards | None = None,
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
        self._shards = shards
        if shards is not None and type(optimizer) not in ELEMENT_WISE:
            raise TypeError(
                f"{type(optimizer).__name__} is not known to update each element of a parameter by itself, so its "
                "update cannot be divided among the ranks: leave shards (shard_update) out, or take one of "
                f"{', '.join(kind.__name__ for kind in ELEMENT_WISE)}"
            )
        on_gpu = [self.device] if self.device.type == "cuda" else None
        distribution = {"gradient_as_bucket_view": True, **distribution}
        # Before torch 2.13 the one argument, broadcast_buffers, leaves buffers out at the start too.
        older = "forward_sync_buffers" not in signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {} if older else {"forward_sync_buffers": False}
        self._parallel = DistributedDataParallel(module, device_ids=on_gpu, **buffers, **distribution)
        if older:
            self._parallel.broadcast_buffers = False
        self.module = self._parallel
        self._announce_micro_batch()

    def _announce_micro_batch(self) -> None:
        """Exchange gradients in the last micro-batch only."""
        self._parallel.require_backward_grad_sync = self._ends_update

    def _update(self) -> None:
        if self._shards is not None:
            self._shards.take_gradients()
        super()._update()
        if self._shards is not None:
            self._network.zero_grad()

    def _clip(self) -> None:
        if self._shards is None:
            super()._clip()
            return
        parts = [piece.part.grad for piece in self._shards.pieces if piece.part.grad is not None]
        if self.loss_scaling:
            self._unscale_shards()
        if self._clip_grad_norm:
            norms = [norm.float() for norm in torch._foreach_norm(parts)] if parts else []
            own = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)
            # What no group has counts in the norm as it does undivided; every rank has it whole.
            trained = {parameter for members in self._shards.members for parameter in members}
            for parameter in self._network.parameters():
                if parameter.grad is not None and parameter not in trained:
                    own = own + parameter.grad.float().square().sum() / self.communicator.world_size
            norm = self.communicator.all_reduce_sum(own).sqrt()
            torch._foreach_mul_(parts, (self._clip_grad_norm / (norm + 1e-6)).clamp(max=1.0))

    def _step(self) -> None:
        super()._step()
        if self._shards is not None:
            self._shards.gather()

    def _own_state(self) -> EngineState:
        if self._shards is None:
            return super()._own_state()
        rank, world_size = self.communicator.rank, self.communicator.world_size
        return sharded_state(self.kind, self._network, self.optimizer, self._shards, rank, world_size)

    def load_state(self, saved: SavedState) -> None:
        """Load what this rank holds, and bring the parts together. Collective."""
        super().load_state(saved)
        if self._shards is not None:
            self._shards.gather()

    def _load_own_state(self, saved: SavedState) -> None:
        if self._shards is None:
            super()._load_own_state(saved)
        else:
            load_sharded(self._network, self.optimizer, self._shards, saved)

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameters, and the optimizer's state where it is not divided."""
        if self._shards is None:
            yield from super().replicated_tensors()
        else:
            yield from self._network.named_parameters()

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Move the parameters to θ and back. Collective where the update is divided."""
        with super().base_iterate():
            if self._shards is not None:
                self._shards.gather()
            yield
        if self._shards is not None:
            self._shards.gather()
