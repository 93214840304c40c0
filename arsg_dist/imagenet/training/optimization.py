"""Build the optimizer, parameter groups and schedules that a recipe names."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from arsg_dist.engine import Communicator
from arsg_dist.imagenet.config import OptimizerConfig, TrainConfig
from arsg_dist.optim import LossPlateau, ObservationBoost, RemoteObservation
from arsg_dist.optim.by_name import INNER, make_optimizer, settings_of
from arsg_dist.optim.schedulers.base import set_value
from arsg_dist.safe_io.text import printable


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """Build a recipe's optimizer over parameters, or groups of `parameter_groups`.

    Raises:
        ValueError: no such optimizer, a key it does not have, or a value it refuses.
    """
    settings_of(config.type, config.params)
    try:
        return make_optimizer(config.type, config.params, parameters)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"optimizer.params {config.params}: {error}") from None


def check_optimizer(config: OptimizerConfig) -> None:
    """Refuse an optimizer that cannot be built, by building it over a dummy.

    Raises:
        ValueError: as `build_optimizer`.
    """
    build_optimizer(config, [nn.Parameter(torch.zeros(1))])


def optimizer_settings(config: OptimizerConfig) -> dict[str, Any]:
    """Return the settings of an optimizer, its own defaults included, but for those that only choose how to compute.

    Raises:
        ValueError: as `build_optimizer`.
    """
    optimizer = build_optimizer(config, [nn.Parameter(torch.zeros(1))])
    known = set(settings_of(config.type, config.params)) - set(_HOW_TO_COMPUTE)
    named = {INNER: config.params[INNER]} if INNER in config.params else {}
    return named | {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in optimizer.defaults.items()
        if name in known and isinstance(value, _PLAIN)
    }


_PLAIN: Final = (bool, int, float, str, list, tuple, type(None))
_HOW_TO_COMPUTE: Final = ("foreach", "fused", "capturable", "differentiable")


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the trainable parameters: norms and biases apart if they do not decay."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if config.decay_norm_and_bias:
        return [{"params": parameters}]
    decays = {"weight_decay": 0.0}
    if config.type == RemoteObservation.__name__:
        decays["remote_cautious_weight_decay"] = 0.0
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1]},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], **decays},
    ]
    return [group for group in groups if group["params"]]


class Schedules:
    """Learning rate and μ over the run: the recipe's schedule and boost.

    Args:
        config: of the run.
        optimizer: the innermost one; its groups' lr and mu are changed.
        updates_per_epoch: weight updates per epoch, which may be fractional.
        communicator: of all ranks, which decide alike on a plateau.
    """

    def __init__(
        self,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer,
        *,
        updates_per_epoch: float,
        communicator: Communicator,
    ) -> None:
        self._optimizer = optimizer
        self._schedule = LambdaLR(optimizer, partial(lr_factor, config, updates_per_epoch))
        self._boost: ObservationBoost | None = None
        boost = config.boost
        if boost.wanted:
            self._boost = ObservationBoost(
                optimizer,
                milestones=None if boost.plateau else boost.milestones,
                plateau=LossPlateau(patience=boost.patience, threshold=boost.threshold)
                if boost.plateau
                else None,
                factor=boost.factor,
                max_boosts=boost.max_boosts if boost.plateau else None,
                rescale=[self._schedule],
                reduce=communicator.all_reduce_sum if boost.plateau else None,
            )

    def after_update(self) -> None:
        """Step the learning rate, after every weight update."""
        self._schedule.step()

    def after_epoch(self, mean_loss: float) -> None:
        """Step the boost, after every epoch. Collective.

        Args:
            mean_loss: training loss of the epoch, over all ranks; the boost leaves one that is not finite out.
        """
        if self._boost is None:
            return
        if self._boost.plateau is not None:
            self._boost.record(mean_loss)
        self._boost.step()

    def change_optimizer(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """Go on with other settings of the optimizer than the loaded ones.

        lr and μ are multiplied, so that a schedule and boosts stay on them; another setting is replaced where a group
        does not have one of its own.

        Args:
            before: name → value when the loaded state was made.
            now: name → value from here on; the same names.

        Raises:
            ValueError: lr was 0, which no factor changes, or no number.
        """
        groups = self._optimizer.param_groups
        for name, new in now.items():
            old = before[name]
            if name not in ("lr", "mu", "remote_mu") or (name == "mu" and not old):
                for group in groups:
                    if name in group and _plain(group[name]) == _plain(old):
                        group[name] = tuple(new) if isinstance(group[name], tuple) else new
                continue
            if not old or not isinstance(old, int | float):
                raise ValueError(
                    f"optimizer.params.{name} was {printable(old, limit=40)}: nothing to multiply"
                )
            ratio = new / old
            for group in groups:
                # A boost's own is that of the wrapper's μ, where there is one.
                initial = "" if name == "mu" and "remote_mu" in group else name.removeprefix("remote_")
                for key in (name, f"initial_{initial}"):
                    if key in group:
                        set_value(group, key, float(group[key]) * ratio)
            if name == "lr":
                for scheduler in filter(None, (self._schedule, self._boost)):
                    scheduler.base_lrs = [lr * ratio for lr in scheduler.base_lrs]
                    scheduler._last_lr = [lr * ratio for lr in scheduler._last_lr]

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists."""
        boost = self._boost.state_dict() if self._boost else None
        return {"schedule": self._schedule.state_dict(), "boost": boost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; lr and mu come with the optimizer's own.

        Args:
            state: what `state_dict` gave, perhaps of somebody else's run.

        Raises:
            ValueError: it is none, or the run was made with a boost and is resumed without, or the other way round.
        """
        own = self.state_dict()
        if not isinstance(state, dict) or state.keys() != own.keys():
            raise ValueError("the checkpoint's schedules are none of arsg-imagenet's")
        if (state["boost"] is None) != (self._boost is None):
            raise ValueError(
                "the checkpoint was made with another setting of boost: resume it with the one it has"
            )
        _check_like(state, own, "the checkpoint's schedules")
        try:
            self._schedule.load_state_dict(state["schedule"])
            if self._boost:
                self._boost.load_state_dict(state["boost"])
        except KeyError as error:
            raise ValueError(f"the checkpoint's schedules lack {error}") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_like(saved: Any, own: Any, what: str) -> None:
    """Raise ValueError unless a saved state has only our keys, and our kinds."""
    number = (int, float)
    if isinstance(own, dict) and isinstance(saved, dict):
        for key, value in saved.items():
            if key not in own:
                raise ValueError(f"{what} have {key!r}, which is none of theirs")
            _check_like(value, own[key], what)
    elif isinstance(own, list) and isinstance(saved, list):
        for value in saved:
            _check_like(value, own[0] if own else 0, what)
    elif own is None and isinstance(saved, list):  # nothing yet, as the ratios of a boost that has not been
        _check_like(saved, [0.0], what)
    elif not (type(saved) is type(own) or (type(saved) in number and type(own) in number)):
        raise ValueError(f"{what} have {printable(saved, limit=100)!r} where {own!r} is now")


def lr_factor(config: TrainConfig, updates_per_epoch: float, update: int) -> float:
    """Return the factor on the recipe's learning rate, before any boost.

    Args:
        config: of the run.
        updates_per_epoch: weight updates per epoch, which may be fractional.
        update: weight updates made so far.
    """
    schedule = config.schedule
    scale = config.batch_size / schedule.linear_scaling_from if schedule.linear_scaling_from else 1.0
    warmup = schedule.warmup_epochs * updates_per_epoch
    if update < warmup:
        # Warm-up to a scaled learning rate starts at the unscaled one; without scaling at a first small step.
        start = 1.0 if scale > 1 else 0.0
        return start + (scale - start) * (update + 1) / (warmup + 1)
    if schedule.name == "step":
        passed = sum(update >= milestone * updates_per_epoch for milestone in schedule.milestones)
        return float(scale * schedule.gamma**passed)
    if schedule.name == "cosine":
        total = config.epochs * updates_per_epoch
        return scale * 0.5 * (1 + math.cos(math.pi * min(1.0, (update - warmup) / (total - warmup))))
    return scale


def shown_hyperparameters(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the first group's learning rate and, if it has one, μ, to be shown."""
    group: dict[str, Any] = optimizer.param_groups[0]
    shown: dict[str, float] = {key: float(group[key]) for key in ("lr", "mu") if key in group}
    return shown | ({"mu": float(group["remote_mu"])} if "remote_mu" in group else {})
