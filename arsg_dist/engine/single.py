"""The engine of a job with one rank, and of replicated ranks whose optimizer exchanges the gradients itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arsg_dist.engine.base import Engine
from arsg_dist.engine.communicator import Communicator, SingleProcessCommunicator
from arsg_dist.optim import ARSG

_FILE = "replicated.pt"


class SingleProcessEngine(Engine):
    """Plain PyTorch training with gradient accumulation.

    Args:
        module: the model, on the device to train on.
        optimizer: over the model's parameters.
        accumulation_steps: micro-batches per update.
        clip_grad_norm: the gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation_steps: int = 1,
        clip_grad_norm: float = 0.0,
        loss_scaling: bool = False,
    ) -> None:
        self.communicator: Communicator = SingleProcessCommunicator()
        self.module = module
        self.optimizer = optimizer
        self.accumulation_steps = accumulation_steps
        self.device = next(module.parameters()).device
        self._clip_grad_norm = clip_grad_norm
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
        self._clip()
        self._step()

    def _clip(self) -> None:
        if self._clip_grad_norm:
            self._grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip_grad_norm)

    def _step(self) -> None:
        self._grad_scaler.step(self.optimizer)
        self._grad_scaler.update()

    def save(self, directory: Path, progress: dict[str, Any]) -> None:
        """Rank 0 writes one file: every rank holds the same state."""
        self._refuse_at_base_iterate("save")
        if self.communicator.rank == 0:
            self._write(directory, self.module.state_dict(), self.optimizer.state_dict(), progress)

    def _write(
        self, directory: Path, model: dict[str, Any], optimizer: dict[str, Any], progress: dict[str, Any]
    ) -> None:
        try:
            torch.save(
                {
                    "model": model,
                    "optimizer": optimizer,
                    "grad_scaler": self._grad_scaler.state_dict(),
                    "progress": progress,
                },
                directory / _FILE,
            )
        except RuntimeError as error:  # how torch's writer says that the disk is full
            raise OSError(f"cannot write {directory / _FILE}: {str(error).splitlines()[0]}") from error

    def load(self, directory: Path) -> dict[str, Any]:
        """Every rank reads the one file, without executing anything in it; works on any number of ranks."""
        self._refuse_at_base_iterate("load")
        path = directory / _FILE
        if not path.is_file():
            raise ValueError(
                f"{directory} holds no {_FILE}: it was not written by the single-process or Horovod engine; "
                "resume it with the engine that wrote it"
            )
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._grad_scaler.is_enabled() and state.get("grad_scaler"):
            self._grad_scaler.load_state_dict(state["grad_scaler"])
        progress: dict[str, Any] = state["progress"]
        return progress

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
