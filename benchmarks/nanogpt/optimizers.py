"""The optimizers of a run, by name, over the track's groups of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from arsg_dist.optim.arsg import ARSG
from arsg_dist.optim.remote_observation import RemoteObservation
from benchmarks.nanogpt.model import GPT

Groups = dict[str, list[Parameter]]
NEWTON_SCHULZ: Final = {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 12}
"""Of the track's Muon: to the nearest orthogonal matrix, not near to it in few steps."""


def groups_of(model: GPT) -> Groups:
    """Divide the parameters as the track's baseline does."""
    groups: Groups = {"embedding": [], "head": [], "matrices": [], "vectors": []}
    for name, param in model.named_parameters():
        if param.ndim < 2:
            groups["vectors"].append(param)
        elif name.startswith(("embedding", "head")):
            groups[name.split(".")[0]].append(param)
        else:
            groups["matrices"].append(param)
    return groups


def _around(
    groups: Groups, scale: float, names: tuple[str, ...] = ("embedding", "head", "vectors")
) -> list[Any]:
    """Return groups with the track's learning rates for all but the matrices, times a factor."""
    rates = {"embedding": 0.7, "head": 0.004, "vectors": 0.015}
    return [{"params": groups[name], "lr": scale * rates[name]} for name in names]


def _muon(matrices: list[Parameter], lr: float, weight_decay: float) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no torch.optim.Muon: 2.9 or later has")
    return torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, **NEWTON_SCHULZ)


def muon(groups: Groups, scale: float) -> list[Optimizer]:
    """The track's baseline: Muon for the blocks' matrices, AdamW for the rest."""
    return [
        AdamW(_around(groups, scale), betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001),
        _muon(groups["matrices"], 0.025 * scale, 0.05),
    ]


def adamw(groups: Groups, scale: float) -> list[Optimizer]:
    """The track's AdamW for the matrices, too."""
    matrices = {"params": groups["matrices"], "lr": 0.0015 * scale, "betas": (0.9, 0.95), "weight_decay": 0.1}
    return [AdamW([*_around(groups, scale), matrices], betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001)]


def arsg(groups: Groups, scale: float) -> list[Optimizer]:
    """ARSG with Adam's preconditioner in place of AdamW everywhere."""
    matrices = {"params": groups["matrices"], "lr": 0.0015 * scale, "weight_decay": 0.1}
    return [_arsg([*_around(groups, scale), matrices])]


def arsg_muon(groups: Groups, scale: float) -> list[Optimizer]:
    """The baseline with ARSG in place of its AdamW."""
    return [_arsg(_around(groups, scale)), _muon(groups["matrices"], 0.025 * scale, 0.05)]


def _arsg(groups: list[Any]) -> Optimizer:
    return ARSG(
        groups,
        betas=(0.9, 0.95),
        mu=0.3,
        eps=1e-10,
        weight_decay=0.001,
        decoupled_weight_decay=True,
        preconditioner="adam",
    )


def remote_adamw(groups: Groups, scale: float) -> list[Optimizer]:
    """RemoteObservation around AdamW without momentum, everywhere; learning rates times μ, as its guide says."""
    mu = 0.2
    matrices = {"params": groups["matrices"], "lr": 0.0015 * scale * mu, "weight_decay": 0.1}
    inner = AdamW([*_around(groups, scale * mu), matrices], betas=(0.0, 0.95), eps=1e-10, weight_decay=0.001)
    return [RemoteObservation(inner, mu=mu, beta1=0.9)]


def remote_muon(groups: Groups, scale: float) -> list[Optimizer]:
    """RemoteObservation around the whole baseline, with the inner settings and the distance of the track's result 39.

    Its EMA-Nesterov has β = 0.6 and γ = 0.99, which is μ = 0.4 and β1 = 0.996. There β follows the learning rate, and
    is 0 in the first 500 updates and after 2,400. Here it is constant.
    """
    inner = [
        AdamW(_around(groups, scale), betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001),
        _muon(groups["matrices"], 0.035 * scale, 0.025),
    ]
    return [RemoteObservation(optimizer, mu=0.4, beta1=0.996) for optimizer in inner]


OPTIMIZERS: Final[dict[str, Callable[[Groups, float], list[Optimizer]]]] = {
    "muon": muon,
    "adamw": adamw,
    "arsg": arsg,
    "arsg-muon": arsg_muon,
    "remote-adamw": remote_adamw,
    "remote-muon": remote_muon,
}
WARMUP: Final = {"muon": 0, "remote-muon": 0, "arsg-muon": 0}
"""Updates in which the learning rate rises; the track's AdamW has 250, and so have the others here."""


def make(name: str, model: nn.Module, scale: float = 1.0) -> list[Optimizer]:
    """Make the optimizers of a name over a network; each group keeps the learning rate it begins with."""
    assert isinstance(model, GPT)
    optimizers = OPTIMIZERS[name](groups_of(model), scale)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def set_learning_rates(optimizers: list[Optimizer], update: int, steps: int, warmup: int) -> float:
    """Set the learning rates of an update: a rise, if any, a constant, down to 0 in the last 70 %."""
    factor = min(1.0, (1 - update / steps) / 0.7) * (min(1.0, (update + 1) / warmup) if warmup else 1.0)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["initial_lr"] * factor
    return factor
