"""Convert settings and state of Adam-like and QHM optimizers to ARSG's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, NAdam, Optimizer

from arsg_dist.optim.hyperparameters import bias_correction
from arsg_dist.optim.state import MOMENTS

Settings = dict[str, Any]

_CARRIED = ("params", "param_names", "initial_lr")
"""Entries of a group that are no settings of the method."""


def adam_group(group: Settings, *, nesterov: bool) -> Settings:
    """Return ARSG's settings for a group of Adam, AdamW or NAdam (`nesterov`).

    Raises:
        ValueError: for differentiable=True.
    """
    if group.get("differentiable", False):
        raise ValueError("differentiable=True has no counterpart in ARSG")
    beta1, beta2 = (float(beta) for beta in group["betas"])
    amsgrad = group.get("amsgrad", False)
    converted = {
        "lr": group["lr"],
        "betas": (beta1, beta2),
        "eps": group["eps"] ** 2 if amsgrad else group["eps"],
        "weight_decay": group["weight_decay"],
        "preconditioner": "amsgrad" if amsgrad else "adam",
    }
    if nesterov:
        converted["mu"] = 1.0 - beta1
    for name in ("decoupled_weight_decay", "maximize", "capturable", "foreach", "fused"):
        if name in group:
            converted[name] = group[name]
    return converted


def adam_state(state: Settings, source: Settings, target: Settings) -> Settings:
    """Return an Adam-like optimizer's moments as the target group keeps them.

    Where the target applies no bias correction ("amsgrad", "none") the moments are transferred corrected, so
    that a young state does not shrink the next steps.
    """
    step = int(state["step"])
    moments: Settings = {name: state[name] for name in MOMENTS["amsgrad"] if name in state}
    if target["preconditioner"] != "adam" and step > 0:
        beta1, beta2 = (float(beta) for beta in source["betas"])
        corrections = {"exp_avg": bias_correction(beta1, step)}
        moments = {
            name: value / corrections.get(name, bias_correction(beta2, step))
            for name, value in moments.items()
        }
    moments.setdefault("max_exp_avg_sq", moments["exp_avg_sq"])
    return {"step": step, **moments}


def qhm_group(group: Settings) -> Settings:
    """Return ARSG's settings for a group of `qhoptim.pyt.QHM`: μ = 1 − ν.

    Raises:
        TypeError: not a QHM group.
        ValueError: ν outside (0, 1], or an unknown weight_decay_type.
    """
    missing = {"lr", "momentum", "nu"} - group.keys()
    if missing:
        raise TypeError(f"not a QHM optimizer: its groups have no {sorted(missing)}")
    if not 0.0 < group["nu"] <= 1.0:
        raise ValueError(f"QHM's nu = {group['nu']} gives mu = 1 - nu outside [0, 1); nu = 0 is plain SGD")
    decay_type = group.get("weight_decay_type", "grad")
    if decay_type not in ("grad", "direct"):
        raise ValueError(f"unknown weight_decay_type {decay_type!r}")
    return {
        "lr": group["lr"],
        "betas": (group["momentum"], 0.99),  # β2 is not used without a preconditioner
        "mu": 1.0 - group["nu"],
        "weight_decay": group.get("weight_decay", 0.0),
        "decoupled_weight_decay": decay_type == "direct",
        "preconditioner": "none",
    }


def qhm_state(state: Settings, source: Settings, target: Settings) -> Settings:
    """Return QHM's dampened momentum buffer as m."""
    if target["preconditioner"] != "none":
        raise ValueError(
            "QHM has no second moment to transfer: give keep_state=False or preconditioner='none'"
        )
    return {"exp_avg": state["momentum_buffer"]}


def converted_groups(
    optimizer: Optimizer, convert: Callable[[Settings], Settings], overrides: Settings
) -> list[Settings]:
    """Return parameter groups for ARSG; `overrides` win in every group."""
    groups = []
    for source in optimizer.param_groups:
        group = {**convert(source), **overrides}
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone()
        group.update({name: source[name] for name in _CARRIED if name in source})
        groups.append(group)
    return groups


@torch.no_grad()
def fill_state(new: Settings, source: Settings) -> None:
    """Copy what `source` has into a parameter's new state, in its dtypes."""
    for name, value in new.items():
        if name not in source:
            continue
        if isinstance(value, Tensor):
            value.copy_(torch.as_tensor(source[name]))
        else:
            new[name] = source[name]


def is_nesterov(optimizer: Optimizer) -> bool:
    """Say whether an Adam-like optimizer is NAdam.

    Raises:
        TypeError: neither torch's Adam, AdamW nor NAdam.
    """
    if not isinstance(optimizer, Adam | NAdam):
        raise TypeError(f"from_adam takes torch's Adam, AdamW or NAdam, got {type(optimizer).__name__}")
    return isinstance(optimizer, NAdam)
