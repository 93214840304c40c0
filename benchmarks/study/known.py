"""Problems whose optimum is known: a noisy quadratic and a matrix factorisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.study.problem import Problem


class _Vector(nn.Module):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)


class Quadratic(Problem):
    """½ Σ λx² with 100 curvatures from 10⁻³ to 1; the gradient has noise of the same variance in every direction.

    Args:
        seed: of the start and the noise.
        noise: standard deviation of an element of the gradient.
    """

    def __init__(self, seed: int, noise: float) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._curvature, self._noise = torch.logspace(-3, 0, 100), noise
        self.module = _Vector(torch.randn(100, generator=self._generator))

    def batch_loss(self, update: int) -> Tensor:
        """Return a loss with the noisy gradient; the optimum's is 0."""
        noise = self._noise * torch.randn(100, generator=self._generator)
        return (self._curvature * self.module.x**2).sum() / 2 + (noise * self.module.x).sum()

    @torch.no_grad()
    def validation_loss(self, full: bool) -> float:
        """Return log10 of the loss without noise."""
        return _log10((self._curvature * self.module.x**2).sum() / 2)

    def training_loss(self) -> float:
        """Return the same."""
        return self.validation_loss(True)


class _Factors(nn.Module):
    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)


class Factorisation(Problem):
    """Find A·B of rank 8 that equals a 40 × 30 matrix of rank 4, from 200 of its entries at a time.

    Args:
        seed: of the matrix, the start and the entries.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._wanted = self._normal(40, 4) @ self._normal(4, 30) / 2
        self.module = _Factors(0.1 * self._normal(40, 8), 0.1 * self._normal(8, 30))

    def matrices(self) -> list[nn.Parameter]:
        """Return both factors."""
        return list(self.module.parameters())

    def batch_loss(self, update: int) -> Tensor:
        """Return the mean square of 200 entries' errors; the optimum's is 0."""
        entries = torch.randint(40 * 30, (200,), generator=self._generator)
        return self._errors()[entries].square().mean()

    @torch.no_grad()
    def validation_loss(self, full: bool) -> float:
        """Return log10 of the mean square of all errors."""
        return _log10(self._errors().square().mean())

    def training_loss(self) -> float:
        """Return the same."""
        return self.validation_loss(True)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _errors(self) -> Tensor:
        return (self.module.left @ self.module.right - self._wanted).flatten()


def _log10(loss: Tensor) -> float:
    value = float(loss)
    return math.log10(max(value, 1e-30)) if math.isfinite(value) else math.inf
