"""Recover the base iterate θ behind x from the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.optim.hyperparameters import Hyperparameters, bias_correction, compute_dtype
from arsg_dist.optim.state import local, real, required

MOVEMENT: Final = "movement"
"""Key of d in the state of a parameter under `RemoteObservation`, beside what the inner optimizer keeps."""
UNIT: Final = "remote_unit"
"""Key in a group of the unit its movements are kept in: d = unit × movement. A boost changes it, and so every d at
once, also those that other ranks or sub-groups keep."""


def has_base_iterate(group: dict[str, Any]) -> bool:
    """Tell from the settings of a parameter group, perhaps a saved one, whether its parameters have a θ."""
    return "remote_mu" in group or "base_iterate_scale" in group


def base_iterate_point(x: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return θ = x + α·η·m/√v̂ (with the preconditioner's denominator; with none where m is preconditioned).

    Under `RemoteObservation`, whatever its inner optimizer, θ = x − (1−μ)·d.

    The relation of the paper's two-point form: with constant hyper-parameters and a constant denominator θ is
    exactly the iterate of that form; otherwise the point the next observation would be extrapolated from.

    Args:
        x: parameters, or any slice of them; complex ones are taken as real.
        state: `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq`, `step` as far as the preconditioner needs them, or `movement`,
            for the same elements as `x`.
        group: the parameter group; ARSG's `base_iterate_scale` holds α·η of the last step.

    Returns:
        θ in a new tensor, in the dtype of the arithmetic (float64 for float64 parameters, else float32), of
        the shape of `x` (with a last dimension of 2 for complex parameters).
    """
    dtype = compute_dtype(x.dtype)
    if "remote_mu" in group:
        start = real(x).to(dtype)
        if group["remote_mu"] == 1 and MOVEMENT not in state:
            return start.clone()
        reach = (1 - group["remote_mu"]) * group.get(UNIT, 1.0)
        return start.sub(_moment(state, MOVEMENT, dtype), alpha=reach)
    hyper = Hyperparameters.of_group(group)
    scale: float | Tensor = group["base_iterate_scale"]

    def moment(name: str) -> Tensor:
        return _moment(state, name, dtype)

    direction = moment("exp_avg")
    if hyper.corrects_first:
        direction = direction / bias_correction(hyper.beta1, required(state, "step"))
    if hyper.precondition_first:
        pass
    elif hyper.preconditioner == "amsgrad":
        direction = direction / moment("max_exp_avg_sq").clamp(min=hyper.floor(dtype)).sqrt()
    elif hyper.preconditioner == "adam":
        v = moment("exp_avg_sq").clamp(min=torch.finfo(dtype).tiny)
        if hyper.corrects_second:
            v = v / bias_correction(hyper.beta2, required(state, "step"))
        direction = direction / (v.sqrt() + hyper.eps)
    return real(x).to(dtype) + scale * direction


def _moment(state: dict[str, Any], name: str, dtype: torch.dtype) -> Tensor:
    stored: Tensor = required(state, name)
    return real(local(stored)).to(dtype)


@contextmanager
def moved_to_base_iterate(
    optimizer: Any, point: Callable[[Tensor, dict[str, Any]], Tensor | None]
) -> Iterator[None]:
    """Move an optimizer's parameters to their base iterates, and back on leaving.

    Args:
        optimizer: whose `_at_base_iterate` tells that it is so meanwhile.
        point: gives θ of a parameter of a group, as `base_iterate_point`; None leaves the parameter where it is.

    Raises:
        RuntimeError: nested use.
    """
    refuse_at_base_iterate(optimizer._at_base_iterate, "base_iterate")
    moved: list[tuple[Tensor, Tensor]] = []
    optimizer._at_base_iterate = True
    try:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for param in group["params"]:
                    theta = point(param, group)
                    if theta is not None:
                        moved.append((param, param.detach().clone()))
                        real(local(param)).copy_(theta)
        yield
    finally:
        optimizer._at_base_iterate = False
        with torch.no_grad():
            for param, x in moved:
                param.copy_(x)


def refuse_at_base_iterate(inside: bool, what: str) -> None:
    """Raise RuntimeError inside a `base_iterate` context, where the parameters are not x.

    Args:
        inside: whether it is entered.
        what: the call that is refused.
    """
    if inside:
        raise RuntimeError(f"{what} inside base_iterate(): the parameters are not at the observation point x")
