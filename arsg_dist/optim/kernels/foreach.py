"""Update many parameters with one kernel launch per operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.optim.hyperparameters import Hyperparameters, Steps, bias_correction, compute_dtype
from arsg_dist.optim.kernels.eight_bit import plain, store_rounded
from arsg_dist.optim.kernels.rounding import EXP_AVG_SLOT, EXP_AVG_SQ_SLOT, MAX_EXP_AVG_SQ_SLOT
from arsg_dist.optim.kernels.split_master import joined, split

_PRECONDITIONERS: Final = ("amsgrad", "adam", "none")
_MODES: Final = (
    "decoupled_weight_decay",
    "cautious_weight_decay",
    "bias_correction",
    "precondition_first",
    "maximize",
    "capturable",
)


def supports(hyper: Hyperparameters, params: list[Tensor]) -> bool:
    """Say whether `foreach_step` implements these settings, for any tensors."""
    return hyper.preconditioner in _PRECONDITIONERS and hyper.uses_only(_MODES)


def foreach_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: Steps,
    *,
    hyper: Hyperparameters,
    corrections: Sequence[Tensor] = (),
    firsts: Sequence[int] = (),
) -> None:
    """Update all parameters by torch's multi-tensor kernels.

    See `StepFunction` for the arguments and `reference.arsg_update` for the rule.
    Needs up to twice the parameters' size in temporary memory (numerators and denominators), more for half
    precision, where everything is converted to float32 first.
    """
    if not params:
        return
    dtype = compute_dtype(params[0].dtype)
    if corrections:
        xs = [joined(param, correction) for param, correction in zip(params, corrections, strict=True)]
    else:
        xs = _converted(params, dtype)
    gs, ms = _converted(grads, dtype), _converted(exp_avgs, dtype)
    vs, v_hats = _converted(exp_avg_sqs, dtype), _converted(max_exp_avg_sqs, dtype)

    alpha, beta1, beta2, mu, eps, lam = (
        _on_device(hyper.lr, params[0]),
        hyper.beta1,
        hyper.beta2,
        _on_device(hyper.mu, params[0]),
        hyper.eps,
        hyper.weight_decay,
    )
    factor = hyper.gradient_factor
    if isinstance(factor, Tensor):
        gs = list(torch._foreach_mul(gs, factor.to(dtype)))
    elif factor != 1:
        gs = list(torch._foreach_mul(gs, factor))
    if hyper.maximize:
        gs = list(torch._foreach_neg(gs))
    if lam != 0 and not hyper.decoupled_weight_decay:
        gs = list(torch._foreach_add(gs, xs, alpha=lam))

    if vs:
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)

    denominators: list[Tensor] | None = None
    if hyper.preconditioner == "amsgrad":
        torch._foreach_maximum_(v_hats, vs)
        torch._foreach_maximum_(v_hats, hyper.floor(dtype))
        denominators = list(torch._foreach_sqrt(v_hats))
    elif hyper.preconditioner == "adam":
        denominators = list(torch._foreach_maximum(vs, torch.finfo(dtype).tiny))
        if hyper.corrects_second:
            corrections2: list[Any] = [bias_correction(beta2, t) for t in steps]
            torch._foreach_div_(denominators, corrections2)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, eps)
    if hyper.precondition_first and denominators is not None:
        gs = list(torch._foreach_div(gs, denominators))
        denominators = None
    torch._foreach_lerp_(ms, gs, 1 - beta1)
    averages = ms
    if hyper.corrects_first:
        corrections1: list[Any] = [bias_correction(beta1, t) for t in steps]
        averages = list(torch._foreach_div(ms, corrections1))
    numerators = _numerators(averages, gs, mu)
    if lam != 0 and hyper.cautious_weight_decay:
        # The sign of the update is its numerator's.
        for x, numerator in zip(xs, numerators, strict=True):
            x.copy_(torch.where(numerator.sign() * x.sign() >= 0, (1 - alpha * lam) * x, x))
    elif lam != 0 and hyper.decoupled_weight_decay:
        torch._foreach_mul_(xs, 1 - alpha * lam)
    _move(xs, numerators, denominators, alpha)

    if corrections:
        for param, correction, x in zip(params, corrections, xs, strict=True):
            split(param, correction, x)
    elif xs[0] is not params[0]:
        torch._foreach_copy_(params, xs)
    _store(exp_avgs, ms, steps, EXP_AVG_SLOT, firsts)
    _store(exp_avg_sqs, vs, steps, EXP_AVG_SQ_SLOT, firsts)
    _store(max_exp_avg_sqs, v_hats, steps, MAX_EXP_AVG_SQ_SLOT, firsts)


def _numerators(ms: list[Tensor], gs: list[Tensor], mu: float | Tensor) -> list[Tensor]:
    """Return (1 − μ)m + μg, in new tensors."""
    numerators = list(torch._foreach_mul(ms, 1 - mu))
    if isinstance(mu, Tensor):
        torch._foreach_add_(numerators, torch._foreach_mul(gs, mu))
    elif mu != 0:
        torch._foreach_add_(numerators, gs, alpha=mu)
    return numerators


def _move(
    xs: list[Tensor],
    numerators: list[Tensor],
    denominators: list[Tensor] | None,
    alpha: float | Tensor,
) -> None:
    """Move x ← x − α · numerator / denominator."""
    if isinstance(alpha, Tensor):
        if denominators is not None:
            torch._foreach_div_(numerators, denominators)
        torch._foreach_mul_(numerators, alpha)
        torch._foreach_sub_(xs, numerators)
    elif denominators is not None:
        torch._foreach_addcdiv_(xs, numerators, denominators, -alpha)
    else:
        torch._foreach_add_(xs, numerators, alpha=-alpha)


def _converted(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors themselves where they have `dtype`, else converted copies."""
    return [plain(tensor).to(dtype) for tensor in tensors]


def _on_device(value: float | Tensor, like: Tensor) -> float | Tensor:
    """Put a tensor scalar where the parameters are, as the kernels want it."""
    return value.to(like.device, non_blocking=True) if isinstance(value, Tensor) else value


def _store(
    targets: list[Tensor], values: list[Tensor], steps: Steps, slot: int, firsts: Sequence[int]
) -> None:
    """Write moments back where they were converted."""
    for i, (target, value) in enumerate(zip(targets, values, strict=True)):
        if value is not target:
            store_rounded(target, value, steps[i] if steps else 0, slot, firsts[i] if firsts else 0)
