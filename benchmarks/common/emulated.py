"""Layers whose passes take a known time and no core, as on an accelerator: what else a step costs remains visible."""

from __future__ import annotations

import time
from typing import Any

import torch


class Sleep(torch.autograd.Function):
    """The identity, which takes its time without a core."""

    @staticmethod
    def forward(context: Any, inputs: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        """Sleeps `forward` seconds, and `backward` in the backward pass."""
        context.seconds = backward
        time.sleep(forward)
        return inputs.view_as(inputs)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Sleeps."""
        time.sleep(context.seconds)
        return gradient, None, None


class SleepingLayer(torch.nn.Linear):
    """A product whose gradient is there only after the emulated time.

    Args:
        width: of inputs and outputs.
        forward: seconds that the forward pass sleeps.
        backward: seconds that the backward pass sleeps.
    """

    def __init__(self, width: int, forward: float, backward: float) -> None:
        super().__init__(width, width, bias=False)
        self.seconds = forward, backward

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Shape (batch, width) to the same."""
        outputs: torch.Tensor = Sleep.apply(super().forward(inputs), *self.seconds)
        return outputs
