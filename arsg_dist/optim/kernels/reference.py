"""Define the update in the paper's notation, for others to be tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arsg_dist.optim.hyperparameters import Hyperparameters, Steps, bias_correction, compute_dtype
from arsg_dist.optim.kernels.eight_bit import plain, store_rounded
from arsg_dist.optim.kernels.rounding import EXP_AVG_SLOT, EXP_AVG_SQ_SLOT, MAX_EXP_AVG_SQ_SLOT
from arsg_dist.optim.kernels.split_master import joined, split


def arsg_update(
    x: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor | None,
    v_hat: Tensor | None,
    t: int | Tensor,
    hyper: Hyperparameters,
) -> None:
    """Make one step of the paper's algorithm ARSG in place on x, m, v and v̂.

    The gradient is taken at x, the remote observation point, which is also where the network is used.

    Args:
        x: parameters, float32 or float64; `g`, `m`, `v`, `v_hat` have the same shape and dtype.
        g: gradient at x; left as it is.
        m: first moment.
        v: second moment; None with preconditioner "none".
        v_hat: running maximum of v; None unless the preconditioner is "amsgrad".
        t: number of this step, counted from 1; used by preconditioner "adam" only.
        hyper: the settings.
    """
    alpha, beta1, beta2, mu, eps, lam = (
        hyper.lr,
        hyper.beta1,
        hyper.beta2,
        hyper.mu,
        hyper.eps,
        hyper.weight_decay,
    )
    if hyper.maximize:
        g = -g
    if isinstance(hyper.gradient_factor, Tensor) or hyper.gradient_factor != 1:
        g = g * hyper.gradient_factor
    if lam != 0 and not hyper.decoupled_weight_decay:
        g = g + lam * x

    if v is not None:
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)

    if hyper.preconditioner == "amsgrad":
        assert v is not None
        assert v_hat is not None
        torch.maximum(v_hat, v, out=v_hat).clamp_(min=hyper.floor(x.dtype))
        denominator = v_hat.sqrt()
    elif hyper.preconditioner == "adam":
        assert v is not None
        correction2 = bias_correction(beta2, t) if hyper.corrects_second else 1
        denominator = (v.clamp(min=torch.finfo(x.dtype).tiny) / correction2).sqrt_().add_(eps)
    else:
        denominator = torch.ones_like(x)
    correction1 = bias_correction(beta1, t) if hyper.corrects_first else 1

    if hyper.precondition_first:
        g = g / denominator
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    update = ((1 - mu) / correction1 * m).add_(mu * g)

    if lam != 0 and hyper.cautious_weight_decay:
        x.copy_(torch.where(update.sign() * x.sign() >= 0, (1 - alpha * lam) * x, x))
    elif lam != 0 and hyper.decoupled_weight_decay:
        x.mul_(1 - alpha * lam)
    if not hyper.precondition_first:
        update.div_(denominator)
    x.sub_(update.mul_(alpha))


def reference_step(
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
    """Call `arsg_update` on each parameter; see `StepFunction` for the arguments."""
    for i, param in enumerate(params):
        dtype = compute_dtype(param.dtype)
        step = steps[i] if steps else 0
        first = firsts[i] if firsts else 0
        x = joined(param, corrections[i]) if corrections else param.to(dtype)
        m = plain(exp_avgs[i]).to(dtype)
        v = plain(exp_avg_sqs[i]).to(dtype) if exp_avg_sqs else None
        v_hat = plain(max_exp_avg_sqs[i]).to(dtype) if max_exp_avg_sqs else None

        arsg_update(x, grads[i].to(dtype), m, v, v_hat, step, hyper)

        # Where the dtypes agree these are the stored tensors themselves, already updated.
        if corrections:
            split(param, corrections[i], x)
        elif x is not param:
            param.copy_(x)
        store_rounded(exp_avgs[i], m, step, EXP_AVG_SLOT, first)
        if v is not None:
            store_rounded(exp_avg_sqs[i], v, step, EXP_AVG_SQ_SLOT, first)
        if v_hat is not None:
            store_rounded(max_exp_avg_sqs[i], v_hat, step, MAX_EXP_AVG_SQ_SLOT, first)
