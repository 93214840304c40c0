"""Validation of what users (and JSON files) write into parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.optim.hyper import PRECONDITIONERS

STATE_DTYPES: Final[dict[str, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# A β1 this close to 1 averages over so many steps that lookahead's pulling back mostly cancels the momentum.
LOOKAHEAD_BETA1_LIMIT: Final = 0.99


def validated(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group's settings in canonical types: floats, a tuple of betas, the name of a dtype.

    Args:
        group: a parameter group with every setting present; other keys are ignored.

    Raises:
        ValueError: a value out of its range, or settings that contradict each other.
        TypeError: a value of the wrong kind.
    """
    capturable, foreach = _flag(group, "capturable"), _flag(group, "foreach", optional=True)
    fused = _flag(group, "fused", optional=True)
    if fused and foreach:
        raise ValueError("`fused` and `foreach` cannot be `True` together.")
    for name in ("lr", "mu"):
        if isinstance(group[name], Tensor) and foreach and not capturable:
            raise ValueError(
                f"{name} as a Tensor is not supported for capturable=False and foreach=True: "
                "give a float, or capturable=True"
            )
    if group["preconditioner"] not in PRECONDITIONERS:
        raise ValueError(
            f"Invalid preconditioner: {group['preconditioner']!r}, must be one of {PRECONDITIONERS}"
        )
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    lookahead_k = group["lookahead_k"]
    if isinstance(lookahead_k, bool) or not isinstance(lookahead_k, int):
        raise TypeError(f"lookahead_k must be an int (0 switches it off), got {lookahead_k!r}")
    if lookahead_k < 0:
        raise ValueError(f"Invalid lookahead_k: {lookahead_k}, must be >= 0")
    return {
        "lr": _number_or_tensor(group, "lr"),
        "betas": (
            number("betas[0]", betas[0], below=1.0),
            number("betas[1]", betas[1], below=1.0),
        ),
        "eps": number("eps", group["eps"]),
        "weight_decay": number("weight_decay", group["weight_decay"]),
        "mu": _number_or_tensor(group, "mu", below=1.0),
        "decoupled_weight_decay": _flag(group, "decoupled_weight_decay"),
        "maximize": _flag(group, "maximize"),
        "state_dtype": state_dtype_name(group["state_dtype"]),
        "lookahead_alpha": number("lookahead_alpha", group["lookahead_alpha"], at_most=1.0),
    }


def number(name: str, value: Any, *, below: float = float("inf"), at_most: float = float("inf")) -> float:
    """The value as a float ≥ 0.

    Raises:
        ValueError: it is out of range.
        TypeError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    number = float(value)
    _check_range(name, number, below, at_most)
    return number


def _number_or_tensor(group: Mapping[str, Any], name: str, *, below: float = float("inf")) -> float | Tensor:
    value = group[name]
    if not isinstance(value, Tensor):
        return number(name, value, below=below)
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"Tensor {name} must be floating point, got {value.dtype}")
    if value.device.type != "meta":
        _check_range(name, float(value.item()), below, float("inf"))
    return value


def _check_range(name: str, number: float, below: float, at_most: float) -> None:
    if not (0.0 <= number < below and number <= at_most):
        upper = f" and < {below}" if below != float("inf") else ""
        upper += f" and <= {at_most}" if at_most != float("inf") else ""
        raise ValueError(f"Invalid {name}: {number}, must be finite, >= 0{upper}")


def _flag(group: Mapping[str, Any], name: str, *, optional: bool = False) -> bool | None:
    value = group[name]
    if isinstance(value, bool) or (optional and value is None):
        return value
    raise TypeError(f"{name} must be True or False{' or None' if optional else ''}, got {value!r}")


def state_dtype_name(value: str | torch.dtype | None) -> str | None:
    """The canonical form of a `state_dtype`: a name, since not every checkpoint format stores a torch.dtype.

    Raises:
        ValueError: not one of `STATE_DTYPES`.
    """
    name = str(value).removeprefix("torch.")
    if value is None:
        return None
    if name not in STATE_DTYPES:
        raise ValueError(f"Invalid state_dtype: {value!r}, must be None or one of {tuple(STATE_DTYPES)}")
    return name
