"""Make optimizers by name and settings, as recipes and DeepSpeed configs have them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from arsg_dist.optim.arsg import ARSG
from arsg_dist.optim.lion import Lion
from arsg_dist.optim.remote_observation import SETTINGS, RemoteObservation

OURS: Final = (ARSG, RemoteObservation)
"""Optimizers with a base iterate."""
NAMES: Final = tuple(kind.__name__ for kind in OURS)

INNER: Final = "inner"
"""The setting of a RemoteObservation that names the inner optimizer, whose settings stand beside it."""

ELEMENT_WISE: Final[tuple[type[Optimizer], ...]] = (
    ARSG,
    Lion,
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
"""Every element of their update depends on that element's parameter, gradient and state, and on numbers, only."""


def inner_of(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside a RemoteObservation; others as they are."""
    return optimizer.optimizer if isinstance(optimizer, RemoteObservation) else optimizer


def check_element_wise(kind: type[Optimizer], instead: str) -> None:
    """Refuse a class of optimizers that is not known to update each element by itself.

    Args:
        kind: of the optimizer that makes the update, inside a RemoteObservation if there is one.
        instead: what to do, for the message.

    Raises:
        TypeError: it may look at whole parameters.
    """
    if kind not in ELEMENT_WISE:
        raise TypeError(
            f"{kind.__name__} is not known to update every element of a parameter by itself, as a shard must be "
            f"(LBFGS, Adafactor, LAMB, Muon look at whole parameters): {instead}, or take one of "
            f"{', '.join(known.__name__ for known in ELEMENT_WISE)}"
        )


def stepping_class(name: str, params: Mapping[str, Any], *, where: str = "optimizer") -> type[Optimizer]:
    """Return the class of `make_optimizer` that makes the update: a RemoteObservation's inner one; arguments as there.

    Raises:
        ValueError: there is none.
    """
    kind = class_of(name, where=f"{where}.type")
    return _inner_class(params, where) if kind is RemoteObservation else kind


def class_of(name: str, *, where: str = "optimizer.type") -> type[Optimizer]:
    """Return the class that a name means: one of this package, else of `torch.optim`.

    Args:
        name: of the class.
        where: what messages call the setting.

    Raises:
        ValueError: there is none.
    """
    own = {kind.__name__: kind for kind in (*OURS, Lion)}
    kind = own.get(name) or getattr(torch.optim, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer):
        raise ValueError(f"{where} {name!r} is not known; use {', '.join(own)} or a class of torch.optim")
    return kind


def settings_of(name: str, params: Mapping[str, Any], *, where: str = "optimizer") -> list[str]:
    """List the settings that an optimizer takes by name; those of a RemoteObservation include its inner one's.

    Args:
        name: of the optimizer.
        params: its settings.
        where: what messages call the section that holds the type and params.

    Raises:
        ValueError: there is no such optimizer; or one of the settings is not its own.
    """
    kind = class_of(name, where=f"{where}.type")
    shown = name
    if kind is RemoteObservation:
        inner = _inner_class(params, where)
        known = [INNER, *SETTINGS, *_arguments(inner)]
        shown = f"{name} around {inner.__name__}"
    else:
        known = _arguments(kind)
    if unknown := sorted(set(params) - set(known)):
        raise ValueError(
            f"{shown} has no parameter {', '.join(unknown)} (in {where}.params); it has {', '.join(known)}"
        )
    return known


def _arguments(kind: type[Optimizer]) -> list[str]:
    return list(inspect.signature(kind).parameters)[1:]


def _inner_class(params: Mapping[str, Any], where: str) -> type[Optimizer]:
    if INNER not in params:
        raise ValueError(
            f"RemoteObservation goes around another optimizer: name it by {where}.params.{INNER}, as "
            f"'{INNER}: AdamW', and give its settings beside it"
        )
    if params[INNER] == RemoteObservation.__name__:
        raise ValueError(
            f"{where}.params.{INNER} is RemoteObservation: it goes around another optimizer, once"
        )
    return class_of(params[INNER], where=f"{where}.params.{INNER}")


def make_optimizer(
    name: str,
    params: Mapping[str, Any],
    parameters: Iterable[Parameter] | Iterable[dict[str, Any]],
    *,
    where: str = "optimizer",
) -> Optimizer:
    """Make an optimizer over parameters, or groups of them.

    Args:
        name: of its class.
        params: its settings; of a RemoteObservation "inner", "remote_mu", "remote_beta1",
            "remote_cautious_weight_decay", and the inner optimizer's own.
        parameters: what it is to train.
        where: what messages call the section that holds the type and params.

    Raises:
        ValueError: as `settings_of`.
        TypeError: what the optimizer refuses.
    """
    settings_of(name, params, where=where)
    kind: Any = class_of(name, where=f"{where}.type")
    if kind is not RemoteObservation:
        return kind(parameters, **params)  # type: ignore[no-any-return]
    own = {key.removeprefix("remote_"): params[key] for key in SETTINGS if key in params}
    rest = {key: value for key, value in params.items() if key != INNER and key not in SETTINGS}
    inner: Any = _inner_class(params, where)
    return RemoteObservation(inner(parameters, **rest), **own)
