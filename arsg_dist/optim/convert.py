"""Convert settings and state of other optimizers to ARSG's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from arsg_dist.optim.hyperparameters import Hyperparameters, bias_correction
from arsg_dist.optim.state import MOMENTS

Settings = dict[str, Any]

Momentum = Literal["sum", "average"]
"""How Simplified AdEMAMix keeps m: β1·m + g, or β1·m + (1−β1)·g."""

_CARRIED = ("params", "param_names", "initial_lr")
"""Entries of a group that are no settings of the method."""


def adam_group(group: Settings, optimizer: Optimizer) -> Settings:
    """Return ARSG's settings for a group of Adam, AdamW or NAdam.

    Raises:
        TypeError: the optimizer is none of them.
        ValueError: for differentiable=True.
    """
    if group.get("differentiable", False):
        raise ValueError("differentiable=True has no counterpart in ARSG")
    nesterov = is_nesterov(optimizer)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    amsgrad = group.get("amsgrad", False)
    converted = {
        "lr": group["lr"],
        "betas": (beta1, beta2),
        "eps": group["eps"] ** 2 if amsgrad else group["eps"],
        "weight_decay": group["weight_decay"],
        "decoupled_weight_decay": is_decoupled(group, optimizer),
        "preconditioner": "amsgrad" if amsgrad else "adam",
    }
    if nesterov:
        converted["mu"] = 1.0 - beta1
    for name in ("maximize", "capturable", "foreach", "fused"):
        if name in group:
            converted[name] = group[name]
    return converted


def adam_state(
    state: Settings, source: Settings, target: Settings, *, corrects_first: bool = True
) -> Settings:
    """Return an Adam-like optimizer's moments as the target group keeps them.

    Moments that the target does not correct for their start at 0 (all of "amsgrad" and "none") are transferred
    corrected, so that a young state does not shrink the next steps.

    Args:
        state: of the source's parameter.
        source: its group.
        target: ARSG's group.
        corrects_first: whether the source corrects m.

    Raises:
        ValueError: the target's m averages something else.
    """
    if target["precondition_first"]:
        raise ValueError(
            "with precondition_first=True m averages preconditioned gradients, the source's averages gradients: "
            "give keep_state=False"
        )
    step = int(state["step"])
    moments: Settings = {name: state[name] for name in MOMENTS["amsgrad"] if name in state}
    if step > 0:
        hyper = Hyperparameters.of_group(target)
        beta1, beta2 = (float(beta) for beta in source["betas"])
        if corrects_first and not hyper.corrects_first:
            moments["exp_avg"] = moments["exp_avg"] / bias_correction(beta1, step)
        if not hyper.corrects_second:
            for name in moments.keys() - {"exp_avg"}:
                moments[name] = moments[name] / bias_correction(beta2, step)
    moments.setdefault("max_exp_avg_sq", moments["exp_avg_sq"])
    return {"step": step, **moments}


def require_sgd(optimizer: Optimizer) -> None:
    """Raise TypeError for another optimizer than torch's SGD."""
    if not isinstance(optimizer, SGD):
        raise TypeError(f"from_sgd takes torch's SGD, got {type(optimizer).__name__}")


def sgd_group(group: Settings) -> Settings:
    """Return ARSG's settings for a group of torch's SGD.

    Raises:
        ValueError: for differentiable=True, or dampening of everything.
    """
    if group.get("differentiable", False):
        raise ValueError("differentiable=True has no counterpart in ARSG")
    beta1 = float(group["momentum"])
    dampening = float(group["dampening"]) if beta1 else 0.0
    if not dampening < 1.0:
        raise ValueError(f"SGD's dampening = {dampening} leaves nothing of the gradient")
    return {
        **_scaled(group, (1.0 - dampening) / (1.0 - beta1)),
        "betas": (beta1, 0.99),  # β2 is not used without a preconditioner
        "mu": 1.0 - beta1 if group["nesterov"] and beta1 else 0.0,
        "weight_decay": group["weight_decay"],
        "preconditioner": "none",
        "maximize": group["maximize"],
        "foreach": group["foreach"],
    }


def sgd_state(state: Settings, source: Settings, target: Settings) -> Settings:
    """Return SGD's momentum buffer as m."""
    if target["preconditioner"] != "none":
        raise ValueError(
            "SGD has no second moment to transfer: give keep_state=False or preconditioner='none'"
        )
    buffer = state.get("momentum_buffer")
    if buffer is None:
        return {}
    return {"exp_avg": buffer * ((1.0 - source["momentum"]) / (1.0 - source["dampening"]))}


def qhadam_group(group: Settings) -> Settings:
    """Return ARSG's settings for a group of `qhoptim.pyt.QHAdam`: μ = 1 − ν1.

    Raises:
        TypeError: not a QHAdam group.
        ValueError: ν2 ≠ 1, or ν1 outside (0, 1].
    """
    missing = {"lr", "betas", "nus", "eps"} - group.keys()
    if missing:
        raise TypeError(f"not a QHAdam optimizer: its groups have no {sorted(missing)}")
    nu1, nu2 = group["nus"]
    if nu2 != 1.0:
        raise ValueError(
            f"QHAdam's nus[1] = {nu2}: ARSG divides by the average of g² alone, which is nus[1] = 1"
        )
    if not 0.0 < nu1 <= 1.0:
        raise ValueError(f"QHAdam's nus[0] = {nu1} gives mu = 1 - nus[0] outside [0, 1)")
    return {
        "lr": group["lr"],
        "betas": tuple(group["betas"]),
        "mu": 1.0 - nu1,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "decoupled_weight_decay": group["decouple_weight_decay"],
        "preconditioner": "adam",
    }


def qhadam_state(state: Settings, source: Settings, target: Settings) -> Settings:
    """Return QHAdam's moments, which it keeps corrected, and the number of steps that they are of."""
    beta1, beta2 = source["betas"]
    weights = {"exp_avg": (beta1, state["beta1_weight"]), "exp_avg_sq": (beta2, state["beta2_weight"])}
    uncorrected = {name: state[name] * ((1.0 - beta) * weight) for name, (beta, weight) in weights.items()}
    beta, weight = max(weights.values())
    left = 1.0 - (1.0 - beta) * weight  # βᵗ
    # Once nothing is left to correct, any larger number of steps is right.
    step = round(math.log(max(left, 1e-17)) / math.log(beta)) if beta > 0.0 else 1
    return adam_state({"step": step, **uncorrected}, source, target)


def ademamix_momentum(optimizer: Optimizer, momentum: Momentum | None) -> Momentum:
    """Say how a Simplified AdEMAMix keeps its momentum.

    Raises:
        TypeError: another optimizer.
        ValueError: not known, or not one of the two.
    """
    if momentum is not None:
        if momentum not in get_args(Momentum):
            raise ValueError(f"momentum={momentum!r}: choose one of {get_args(Momentum)}")
        return momentum
    name = type(optimizer).__name__
    known: dict[str, Momentum] = {"SimAdEMAMix": "sum", "SimplifiedAdEMAMix": "average"}
    if name in known:
        return known[name]
    if name == "AdEMAMix":
        raise TypeError(
            "AdEMAMix keeps two averages of the gradient, ARSG one: only the simplified one converts"
        )
    raise ValueError(
        f"from_ademamix does not know {name}: give momentum='sum' if it keeps m = beta1*m + g, "
        "'average' if m = beta1*m + (1-beta1)*g"
    )


def ademamix_group(group: Settings, momentum: Momentum, optimizer: Optimizer) -> Settings:
    """Return ARSG's settings for a group of Simplified AdEMAMix.

    Raises:
        TypeError: not such a group.
        ValueError: a setting that ARSG does not have.
    """
    missing = {"lr", "betas", "alpha", "eps"} - group.keys()
    if missing or len(group["betas"]) != 2:
        raise TypeError(
            f"not a Simplified AdEMAMix: its groups have {f'no {sorted(missing)}' if missing else 'other betas'}"
        )
    warmup = group.get("beta1_warmup") or 0
    if warmup > _steps_of(group, optimizer):
        raise ValueError(
            f"beta1_warmup = {warmup} is not over: ARSG has no such schedule; convert after it, or without it"
        )
    if group.get("fixed_decay") and group["weight_decay"]:
        raise ValueError("fixed_decay=True: ARSG's decay follows the learning rate")
    beta1, beta2 = (float(beta) for beta in group["betas"])
    unit = 1.0 - beta1 if momentum == "sum" else 1.0
    plain = group["alpha"] * unit  # the weight of the gradient beside that of m
    factor = (1.0 + plain) / unit
    decoupled = bool(group.get("weight_decouple", True))
    decay = group.get("weight_decay", 0.0)
    return {
        **_scaled(group, factor),
        "betas": (beta1, beta2),
        "mu": plain / (1.0 + plain),
        "eps": group["eps"],
        "weight_decay": decay / factor if decoupled else decay,
        "decoupled_weight_decay": decoupled,
        "preconditioner": "adam",
        "bias_correction": "second",
        "maximize": bool(getattr(optimizer, "maximize", False)),
    }


def ademamix_state(state: Settings, source: Settings, target: Settings, momentum: Momentum) -> Settings:
    """Return Simplified AdEMAMix's moments and step count."""
    beta1 = float(source["betas"][0])
    step = state["step"] if "step" in state else source.get("step", 0)
    average = state["exp_avg"] * (1.0 - beta1) if momentum == "sum" else state["exp_avg"]
    moments = {"step": step, "exp_avg": average, "exp_avg_sq": state["exp_avg_sq"]}
    return adam_state(moments, source, target, corrects_first=False)


def _steps_of(group: Settings, optimizer: Optimizer) -> int:
    """Return how many steps a group's parameters have had at least."""
    counts = [optimizer.state.get(param, {}).get("step", group.get("step", 0)) for param in group["params"]]
    return min((int(count) for count in counts), default=0)


def _scaled(group: Settings, factor: float) -> Settings:
    """Return the learning rates of a group, those that schedulers keep in it included, times a factor."""
    return {name: group[name] * factor for name in ("lr", "initial_lr", "max_lr", "min_lr") if name in group}


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
        for name in _CARRIED:
            if name in source:
                group.setdefault(name, source[name])
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


def is_decoupled(group: Settings, optimizer: Optimizer) -> bool:
    """Say whether the weight decay of a group of ARSG or one of torch's optimizers is decoupled."""
    # Torch 2.6 says it by the class alone.
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))


def is_nesterov(optimizer: Optimizer) -> bool:
    """Say whether an Adam-like optimizer is NAdam.

    Raises:
        TypeError: neither torch's Adam, AdamW nor NAdam.
    """
    if not isinstance(optimizer, Adam | AdamW | NAdam):  # in torch 2.6 AdamW is no Adam
        raise TypeError(f"from_adam takes torch's Adam, AdamW or NAdam, got {type(optimizer).__name__}")
    return isinstance(optimizer, NAdam)
