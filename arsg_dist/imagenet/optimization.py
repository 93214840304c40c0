"""The optimizer and the learning-rate schedule that a recipe names."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from arsg_dist.imagenet.config import OptimizerConfig, ScheduleConfig
from arsg_dist.optim import ARSG


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of a recipe.

    Raises:
        ValueError: no such optimizer, a key it does not have, or a value it refuses.
    """
    kind = ARSG if config.type == "ARSG" else getattr(torch.optim, config.type, None)
    if not (
        isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    ):
        raise ValueError(f"optimizer.type {config.type!r} is not known; use ARSG or a class of torch.optim")
    known = list(inspect.signature(kind).parameters)[1:]
    unknown = sorted(set(config.params) - set(known))
    if unknown:
        raise ValueError(
            f"{config.type} has no parameter {', '.join(unknown)} (in optimizer.params); it has {', '.join(known)}"
        )
    try:
        return kind(parameters, **config.params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"optimizer.params {config.params}: {error}") from None


def build_schedule(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, *, updates_per_epoch: int, epochs: int
) -> LambdaLR:
    """The schedule of a recipe, to be stepped once per update."""
    warmup = config.warmup_epochs * updates_per_epoch
    total = epochs * updates_per_epoch

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / (warmup + 1)
        if config.name == "step":
            return config.gamma ** sum(
                update >= milestone * updates_per_epoch for milestone in config.milestones
            )
        if config.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))
        return 1.0

    return LambdaLR(optimizer, factor)


def shown_hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rate and, where the optimizer has one, μ, of the first group: what progress displays show."""
    group: dict[str, Any] = optimizer.param_groups[0]
    return {key: float(group[key]) for key in ("lr", "mu") if key in group}
