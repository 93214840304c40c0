"""Put torch's FSDP2 behind the `Engine` interface."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from arsg_dist.engine import (
    Capabilities,
    Communicator,
    EngineState,
    LocalEngine,
    SavedState,
    all_finite,
    copy_weight,
)
from arsg_dist.fsdp.state import load_sharded, sharded_state

CAPABILITIES = Capabilities(
    no_whole_weights="the engine fsdp, under which no rank holds the whole weights: use the engine ddp"
)


class FSDPEngine(LocalEngine):
    """Shard parameters, gradients and optimizer state by `fully_shard`.

    Args:
        module: the model, after `shard`; rank 0's weights were broadcast there. Buffers such as batch norm's statistics
            are each rank's own from then on, as under the other engines.
        optimizer: over the sharded parameters; each rank's `step` updates its own shards.
        communicator: from `connect_torch`.
        accumulation_steps: micro-batches per update and rank; gradients travel in the last of them only, and are kept
            whole until then.
        clip_grad_norm: the averaged gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
        skip_nonfinite: leave out updates whose gradient is not finite; under loss scaling they are in any case.

    Raises:
        ValueError: the model was not sharded.
    """

    kind = "fsdp"
    capabilities = CAPABILITIES

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
    ) -> None:
        if not isinstance(module, FSDPModule):
            raise ValueError(
                "the model is not sharded: call arsg_dist.fsdp.shard(model) before its optimizer is made"
            )
        super().__init__(
            module,
            optimizer,
            communicator,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            loss_scaling=loss_scaling,
            skip_nonfinite=skip_nonfinite,
        )
        self._sharded = module
        self._announce_micro_batch()

    def _announce_micro_batch(self) -> None:
        self._sharded.set_requires_gradient_sync(self._ends_update)

    def _gradient_is_finite(self) -> bool:
        gradients: Any = (p.grad for p in self._network.parameters() if p.grad is not None)
        return not self.communicator.start_any(not all_finite(g.to_local() for g in gradients))()

    def _clip(self) -> None:
        if self.loss_scaling:
            self._unscale_shards()
        if self._clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._network.parameters(), self._clip_grad_norm)

    def local_parameters(self) -> Iterator[torch.Tensor]:
        """Yield this rank's shards."""
        for parameter in self._network.parameters():
            assert isinstance(parameter, DTensor)
            yield parameter.to_local()

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Gather the model's state dict tensor by tensor; only rank 0 keeps them."""
        whole = {}
        for name, tensor in self._network.state_dict().items():
            gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.communicator.rank == 0:
                whole[name] = copy_weight(gathered)
        return whole

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Raise: no rank holds whole weights."""
        raise NotImplementedError("under FSDP no rank holds whole weights to compare")

    def _own_state(self) -> EngineState:
        return sharded_state(self.kind, self._network, self.optimizer, self.communicator.rank)

    def _load_own_state(self, saved: SavedState) -> None:
        load_sharded(self._network, self.optimizer, saved)
