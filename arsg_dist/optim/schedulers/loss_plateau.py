"""Detect that a training loss has flattened."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class LossPlateau:
    """Detect that a smoothed loss has stopped falling.

    The loss is smoothed by an exponential moving average (bias-corrected, so that the first values count
    fully). An observation is an improvement if the average is below the best so far by more than `threshold`
    relative to it. After more than `patience` observations in a row without one, `observe` says True.

    Args:
        smoothing: weight of the past in the average, in [0, 1); 0 takes each loss as it is. Default 0.5,
            meant for one observation an epoch; for one an iteration 0.99 and a patience of some hundreds.
        threshold: smallest relative improvement that counts, in [0, 1). Default 0.01.
        patience: observations without improvement that are tolerated, ≥ 0. Default 2.
        cooldown: observations after a True in which a lack of improvement is not counted, ≥ 0.
            Default 0.

    Raises:
        ValueError: an argument is outside its domain.
    """

    def __init__(
        self, smoothing: float = 0.5, *, threshold: float = 0.01, patience: int = 2, cooldown: int = 0
    ) -> None:
        for name, value in (("smoothing", smoothing), ("threshold", threshold)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        for name, count in (("patience", patience), ("cooldown", cooldown)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{name} must be an integer ≥ 0, got {count!r}")
        self.smoothing = smoothing
        self.threshold = threshold
        self.patience = patience
        self.cooldown = cooldown
        self._weighted_sum = 0.0
        self._weight = 0.0
        self._best = math.inf
        self._without_improvement = 0
        self._cooldown_left = 0

    @property
    def average(self) -> float:
        """Return the smoothed loss; NaN before the first observation."""
        return self._weighted_sum / self._weight if self._weight else math.nan

    def observe(self, loss: float) -> bool:
        """Take in one loss and return whether the smoothed loss has flattened.

        Args:
            loss: a finite number; may be negative.

        Raises:
            ValueError: the loss is not finite.
        """
        if not math.isfinite(loss):
            raise ValueError(f"loss must be finite, got {loss}")
        self._weighted_sum = self.smoothing * self._weighted_sum + (1 - self.smoothing) * loss
        self._weight = self.smoothing * self._weight + (1 - self.smoothing)
        margin = 0.0 if self._best == math.inf else self.threshold * abs(self._best)
        if self.average < self._best - margin:
            self._best = self.average
            self._without_improvement = 0
        elif self._cooldown_left == 0:
            self._without_improvement += 1
        self._cooldown_left = max(0, self._cooldown_left - 1)
        if self._without_improvement <= self.patience:
            return False
        self._without_improvement = 0
        self._cooldown_left = self.cooldown
        return True

    def state_dict(self) -> dict[str, float]:
        """Return the progress (not the settings) as numbers."""
        return {
            "weighted_sum": self._weighted_sum,
            "weight": self._weight,
            "best": self._best,
            "without_improvement": self._without_improvement,
            "cooldown_left": self._cooldown_left,
        }

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue from a saved progress; the settings stay those of this object."""
        self._weighted_sum = state_dict["weighted_sum"]
        self._weight = state_dict["weight"]
        self._best = state_dict["best"]
        self._without_improvement = int(state_dict["without_improvement"])
        self._cooldown_left = int(state_dict["cooldown_left"])


class LossSum:
    """Sum and count finite losses, on their device so that recording never waits."""

    def __init__(self) -> None:
        self._totals = torch.zeros(2, dtype=torch.float64)

    def record(self, loss: float | Tensor) -> None:
        """Add a loss, number or 1-element tensor; one that is not finite is left out.

        Raises:
            ValueError: a tensor of more than one element.
        """
        value = torch.as_tensor(loss).detach()
        if value.numel() != 1:
            raise ValueError(f"loss must be a scalar, got shape {tuple(value.shape)}")
        value = value.reshape(()).to(torch.float64)
        finite = value.isfinite()
        self._totals = self._totals.to(value.device) + torch.stack([value.where(finite, 0.0), finite])

    def drain(self) -> Tensor:
        """Return [sum, number] as a float64 CPU tensor and start again from zero."""
        totals = self._totals.cpu()
        self._totals = torch.zeros(2, dtype=torch.float64)
        return totals

    def state_dict(self) -> list[float]:
        """Return [sum, number]."""
        return [float(total) for total in self._totals.tolist()]

    def load_state_dict(self, totals: list[float]) -> None:
        """Continue from a saved [sum, number]."""
        self._totals = torch.tensor(totals, dtype=torch.float64)
