"""Optimizers at the paper's settings (its table A1).

The paper's numbers are kept as they stand there and converted here: its SGD is x ← x − α(1−β)·Σβᵏg, so torch's lr is
α(1−β).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from arsg_dist import ARSG

Settings = dict[str, Any]

# Per task: α, then the decay rates, then μ (ARSG, RSG) or k and a (RANGER).
_TABLE_A1: dict[str, dict[str, tuple[float, ...]]] = {
    "mnist_logistic": {
        "SGD": (2.0, 0.99),
        "ADAM": (0.005, 0.999, 0.999),
        "NADAM": (0.01, 0.999, 0.999),
        "AMSGRAD": (0.005, 0.99, 0.999),
        "RANGER": (0.02, 0.99, 0.999, 5, 0.5),
        "RSG": (5.0, 0.999, 0.1),
        "ARSG": (0.05, 0.999, 0.99, 0.1),
        "ARSGB": (0.1, 0.999, 0.99, 0.05),
    },
    "mnist_cnn": {
        "SGD": (1.0, 0.9),
        "ADAM": (0.0005, 0.9, 0.999),
        "NADAM": (0.0005, 0.9, 0.999),
        "AMSGRAD": (0.005, 0.9, 0.99),
        "RANGER": (0.005, 0.9, 0.999, 5, 0.2),
        "RSG": (5.0, 0.999, 0.1),
        "ARSG": (0.01, 0.999, 0.99, 0.1),
        "ARSGB": (0.05, 0.999, 0.99, 0.05),
    },
    "cifar10_fast": {
        "SGD": (0.1, 0.9),
        "ADAM": (0.0005, 0.9, 0.99),
        "NADAM": (0.0005, 0.99, 0.999),
        "AMSGRAD": (0.0005, 0.9, 0.99),
        "RANGER": (0.005, 0.99, 0.999, 5, 0.2),
        "RSG": (0.2, 0.999, 0.1),
        "ARSG": (0.002, 0.999, 0.99, 0.1),
        "ARSGB": (0.005, 0.999, 0.99, 0.05),
    },
    "cifar10_fine": {
        "SGD": (0.5, 0.9),
        "ADAM": (0.001, 0.9, 0.99),
        "NADAM": (0.001, 0.9, 0.999),
        "AMSGRAD": (0.001, 0.9, 0.999),
        "RANGER": (0.005, 0.9, 0.999, 5, 0.2),
        "RSG": (1.0, 0.999, 0.1),
        "ARSG": (0.05, 0.999, 0.99, 0.1),
        "ARSGB": (0.05, 0.999, 0.99, 0.05),
    },
}
_KEYS = {
    "SGD": ("lr", "beta1"),
    "RSG": ("lr", "beta1", "mu"),
    "RANGER": ("lr", "beta1", "beta2", "k", "a"),
    "ARSG": ("lr", "beta1", "beta2", "mu"),
    "ARSGB": ("lr", "beta1", "beta2", "mu"),
}
# The paper has no QHAdam. These are its authors' recommended ν and β (Ma and Yarats 2019), at ADAM's lr.
_QHADAM = {"beta1": 0.995, "beta2": 0.999, "nu1": 0.7, "nu2": 1.0}

NAMES = ("SGD", "ADAM", "NADAM", "AMSGRAD", "RANGER", "QHADAM", "RSG", "ARSG", "ARSGB")


def paper_settings(column: str, name: str) -> Settings:
    """The settings of an optimizer for a column of the table.

    Raises:
        ValueError: no such optimizer.
    """
    if name not in NAMES:
        raise ValueError(f"optimizer {name!r} is not known; use one of {', '.join(NAMES)}")
    row = _TABLE_A1[column]
    if name == "QHADAM":
        return {"lr": row["ADAM"][0], **_QHADAM}
    settings = dict(zip(_KEYS.get(name, ("lr", "beta1", "beta2")), row[name], strict=True))
    if name in ("ARSG", "ARSGB"):
        settings["eps"] = 1e-3 if column == "cifar10_fine" else 1e-8
    return settings


def build(
    name: str, parameters: Iterable[torch.nn.Parameter], settings: Settings, weight_decay: float
) -> Optimizer:
    """An optimizer, with L2 weight decay added to the gradient.

    Raises:
        ValueError: a setting that it does not have.
        ImportError: RANGER or QHADAM without `pytorch_optimizer`.
    """
    known = dict(settings)
    optimizer = _BUILDERS[name](parameters, known, weight_decay)
    if known:
        raise ValueError(f"{name} has no setting {', '.join(known)}")
    return optimizer


def arsg_arguments(name: str, settings: Settings, weight_decay: float) -> dict[str, Any]:
    """Keyword arguments of `ARSG` for ARSG, ARSGB and RSG; takes the settings it knows out of `settings`."""
    arguments = {
        "lr": settings.pop("lr"),
        "betas": (settings.pop("beta1"), settings.pop("beta2", 0.99)),
        "eps": settings.pop("eps", 1e-8),
        "mu": settings.pop("mu"),
        "weight_decay": weight_decay,
        "preconditioner": "none" if name == "RSG" else "amsgrad",
    }
    arguments |= {key: settings.pop(key) for key in ("state_dtype", "master") if key in settings}
    return arguments


def _arsg(name: str) -> Callable[..., Optimizer]:
    return lambda parameters, s, wd: ARSG(parameters, **arsg_arguments(name, s, wd))


def _sgd(parameters: Any, s: Settings, wd: float) -> Optimizer:
    beta = s.pop("beta1")
    return torch.optim.SGD(parameters, lr=s.pop("lr") * (1 - beta), momentum=beta, weight_decay=wd)


def _adam_like(kind: Any, **fixed: Any) -> Callable[..., Optimizer]:
    def make(parameters: Any, s: Settings, wd: float) -> Optimizer:
        betas = (s.pop("beta1"), s.pop("beta2"))
        return kind(parameters, lr=s.pop("lr"), betas=betas, weight_decay=wd, **fixed)

    return make


def _third_party() -> Any:
    try:
        import pytorch_optimizer
    except ImportError:
        raise ImportError(
            "RANGER and QHADAM are those of pytorch_optimizer: pip install 'arsg-dist[evidence]'"
        ) from None
    return pytorch_optimizer


def _ranger(parameters: Any, s: Settings, wd: float) -> Optimizer:
    betas = (s.pop("beta1"), s.pop("beta2"))
    kind = _third_party().Ranger
    return kind(
        parameters,
        lr=s.pop("lr"),
        betas=betas,
        k=int(s.pop("k")),
        alpha=s.pop("a"),
        weight_decay=wd,
        weight_decouple=False,
    )


def _qhadam(parameters: Any, s: Settings, wd: float) -> Optimizer:
    betas, nus = (s.pop("beta1"), s.pop("beta2")), (s.pop("nu1"), s.pop("nu2"))
    return _third_party().QHAdam(parameters, lr=s.pop("lr"), betas=betas, nus=nus, weight_decay=wd)


_BUILDERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": _sgd,
    "ADAM": _adam_like(torch.optim.Adam),
    "NADAM": _adam_like(torch.optim.NAdam),
    "AMSGRAD": _adam_like(torch.optim.Adam, amsgrad=True),
    "RANGER": _ranger,
    "QHADAM": _qhadam,
    "RSG": _arsg("RSG"),
    "ARSG": _arsg("ARSG"),
    "ARSGB": _arsg("ARSGB"),
}
