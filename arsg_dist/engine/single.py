"""The engine of a job with one rank, and of replicated ranks whose optimizer exchanges the gradients itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from arsg_dist.engine.base import Engine
from arsg_dist.engine.communicator import Communicator, SingleProcessCommunicator
from arsg_dist.engine.replicated_state import load_replicated, replicated_state
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import EngineState
from arsg_dist.optim import ARSG

_SCALER = "GradScaler"


class SingleProcessEngine(Engine):
    """Plain PyTorch training with gradient accumulation.

    Args:
        module: the model, on the device to train on.
        optimizer: over the model's parameters.
        accumulation_steps: micro-batches per update.
        clip_grad_norm: the gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
        skip_nonfinite: leave out updates whose gradient is not finite; under loss scaling they are in any case.
    """

    kind = "single"

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation_steps: int = 1,
        clip_grad_norm: float = 0.0,
        loss_scaling: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        self.communicator: Communicator = SingleProcessCommunicator()
        self.module = module
        self.optimizer = optimizer
        self.accumulation_steps = accumulation_steps
        self.device = next(module.parameters()).device
        self._clip_grad_norm = clip_grad_norm
        self.loss_scaling = loss_scaling
        self.skipped_updates = 0
        self._skip_nonfinite = skip_nonfinite and not loss_scaling
        self._grad_scaler = torch.amp.GradScaler(self.device.type, enabled=loss_scaling)
        self._micro_batches = 0
        self._at_base_iterate = False

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of `loss` divided by the number of micro-batches."""
        self._refuse_at_base_iterate("backward")
        scaled = self._grad_scaler.scale(loss / self.accumulation_steps)
        scaled.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Counts a micro-batch; updates the weights after the last of an update."""
        self._refuse_at_base_iterate("step")
        self._micro_batches += 1
        if self._micro_batches % self.accumulation_steps == 0:
            self._update()
            self.optimizer.zero_grad()

    def _update(self) -> None:
        if self._skip_nonfinite and not self._gradient_is_finite():
            self.skipped_updates += 1
            return
        self._clip()
        self._step()

    def _gradient_is_finite(self) -> bool:
        """Of the averaged gradient, so that all ranks say the same."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        largest = torch._foreach_norm(gradients, torch.inf)
        return bool(torch.stack([value.float() for value in largest]).isfinite().all()) if largest else True

    def _clip(self) -> None:
        if self._clip_grad_norm:
            self._grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip_grad_norm)

    def _step(self) -> None:
        self._grad_scaler.step(self.optimizer)
        self._grad_scaler.update()

    def state(self) -> EngineState:
        """This rank's share of what every rank holds alike."""
        self._refuse_at_base_iterate("state")
        state = replicated_state(
            self.kind,
            self.module,
            self.optimizer,
            self.communicator.rank,
            self.communicator.world_size,
        )
        state.loss_scale = self._loss_scale()
        return state

    def load_state(self, saved: SavedState) -> None:
        """Every rank reads everything."""
        self._refuse_at_base_iterate("load_state")
        with self.communicator.fail_together():
            load_replicated(self.module, self.optimizer, saved)
        self._load_loss_scale(saved)

    def _loss_scale(self) -> dict[str, Any] | None:
        if not self._grad_scaler.is_enabled():
            return None
        own = self._grad_scaler.state_dict()
        return {"kind": _SCALER, "scale": own["scale"], "since_overflow": own["_growth_tracker"]}

    def _load_loss_scale(self, saved: SavedState) -> None:
        if not self._grad_scaler.is_enabled() or saved.loss_scale is None:
            return
        loaded = self._grad_scaler.state_dict() | {"scale": saved.loss_scale["scale"]}
        if saved.loss_scale["kind"] == _SCALER:
            loaded["_growth_tracker"] = int(saved.loss_scale.get("since_overflow", 0))
        self._grad_scaler.load_state_dict(loaded)

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and optimizer state."""
        for name, parameter in self.module.named_parameters():
            yield name, parameter
            for entry, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    yield f"{name}'s {entry}", value

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Moves the parameters to θ and back; every rank moves its own."""
        if not isinstance(self.optimizer, ARSG):
            raise TypeError(f"the base iterate is ARSG's; this optimizer is {type(self.optimizer).__name__}")
        self._refuse_at_base_iterate("base_iterate")
        with self.optimizer.base_iterate():
            self._at_base_iterate = True
            try:
                yield
            finally:
                self._at_base_iterate = False

    def _refuse_at_base_iterate(self, what: str) -> None:
        if self._at_base_iterate:
            raise RuntimeError(
                f"{what} inside base_iterate(): the parameters are not at the observation point x"
            )
