"""The settings of one parameter group, as every implementation of the update receives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, overload

import torch
from torch import Tensor

Preconditioner = Literal["amsgrad", "adam", "none"]
PRECONDITIONERS: tuple[str, ...] = get_args(Preconditioner)

Steps = Sequence[int] | Sequence[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Hyper:
    """Settings of one group for one step; validated by the optimizer, never changed.

    `lr` and `mu` are Python floats unless the group is capturable or the step is being compiled; then each
    may be a 0-dim floating-point tensor that must not be read on the host. All other numbers are floats.

    Attributes:
        lr: learning rate α ≥ 0.
        beta1: decay β1 of the first moment, in [0, 1).
        beta2: decay β2 of the second moment, in [0, 1).
        mu: observation factor μ, in [0, 1).
        eps: ε ≥ 0. "amsgrad": floor of v̂, inside the root; "adam": added to the root; "none": unused.
        weight_decay: λ ≥ 0.
        preconditioner: which denominator.
        decoupled_weight_decay: x ← x(1 − αλ) first (AdamW), instead of g ← g + λx.
        maximize: g ← −g before everything else.
        capturable: `steps` are 0-dim float32 tensors on the parameters' device and nothing may synchronise.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    mu: float | Tensor
    eps: float
    weight_decay: float
    preconditioner: Preconditioner
    decoupled_weight_decay: bool
    maximize: bool
    capturable: bool

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> Hyper:
        """Read an optimizer's parameter group; tensors for lr and μ become floats where that is allowed."""
        keep_tensors = group["capturable"] or torch.compiler.is_compiling()
        beta1, beta2 = group["betas"]
        return cls(
            lr=scalar(group["lr"], keep_tensors),
            beta1=beta1,
            beta2=beta2,
            mu=scalar(group["mu"], keep_tensors),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            preconditioner=group["preconditioner"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
            maximize=group["maximize"],
            capturable=group["capturable"],
        )

    def floor(self, dtype: torch.dtype) -> float:
        """Smallest value v̂ may take: ε, but never below the smallest normal number of the computing `dtype`.

        So ε = 0 with a zero gradient, a gradient whose square underflows, and padding reloaded as 0 all
        divide by something positive.
        """
        return max(self.eps, torch.finfo(dtype).tiny)

    @property
    def observation_distance(self) -> float | Tensor:
        """η = μβ1/(1 − β1): how far the observation point x runs ahead of the base iterate θ."""
        return self.mu * (self.beta1 / (1.0 - self.beta1))


class StepFunction(Protocol):
    """One update of many parameters in place; the signature shared by the reference, foreach and fused paths.

    All lists are as long as `params` except those the preconditioner does not need, which are empty:
    "amsgrad" uses all three moments, "adam" no `max_exp_avg_sqs`, "none" only `exp_avgs`; `steps` is empty
    unless the update needs it ("adam", or moments in bfloat16).

    Within one call all tensors are real floating-point, on one device; the parameters share one dtype, the
    gradients share one, and all moments share one. Shapes and strides are arbitrary (scalars and zero-size
    tensors included); the tensors of one parameter have one shape. Arithmetic is done in
    `compute_dtype(parameter dtype)`; moments in bfloat16 are stored by `rounding.round_stochastically`, so
    the result is a function of the arguments alone.

    Args:
        params: x, changed in place.
        grads: gradients at x; must not be changed.
        exp_avgs: m, changed in place.
        exp_avg_sqs: v, changed in place.
        max_exp_avg_sqs: v̂, changed in place.
        steps: number t of this update per parameter, counted from 1 (already incremented): Python ints, or
            0-dim float32 tensors if `hyper.capturable`. Must not be changed.
        hyper: the group's settings.
    """

    def __call__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        steps: Steps,
        *,
        hyper: Hyper,
    ) -> None:
        """Update the parameters and moments."""
        ...


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Real dtype of the arithmetic for a parameter's `dtype`: float64 for float64 and complex128, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


@overload
def bias_correction(beta: float, t: int) -> float: ...
@overload
def bias_correction(beta: float, t: Tensor) -> Tensor: ...
def bias_correction(beta: float, t: int | Tensor) -> float | Tensor:
    """1 − βᵗ, for a tensor t without the cancellation that float32 has at small t and β near 1."""
    if isinstance(t, Tensor):
        return -torch.expm1(t * math.log(beta)) if beta > 0 else torch.ones_like(t)
    return 1.0 - beta**t


def scalar(value: float | Tensor, keep_tensor: bool) -> float | Tensor:
    """A setting as a Python float, or as a 0-dim tensor where the host must not read it."""
    if isinstance(value, Tensor):
        return value.squeeze() if keep_tensor else float(value.item())
    return value
