"""The compared optimizers: how each is made, and the box that its settings are searched in.

Every box has the same sides, in factors: learning rate 64, warm-up 16, 1 − β1 32, weight decay 64, and a fifth setting
16, which is the optimizer's own (μ and what corresponds to it, Lookahead's step, the rate of Muon's AdamW) or β2. SGD
and RSG have no second moment: RSG has μ, SGD Nesterov's point or not. The points in the unit cube are the same for all.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from arsg_dist import ARSG, Lion, RemoteObservation
from benchmarks.study.problem import Problem, Task

Settings = dict[str, float]
Groups = list[dict[str, Any]]

TRIALS = 30
_WARMUP, _REST_OF_BETA1 = (0.025, 0.4), (0.0125, 0.4)
_REST_OF_BETA2 = (0.005, 0.08)
_MU, _BOOSTED_MU, _RATIO = (0.05, 0.8), (0.025, 0.4), (0.25, 4.0)
_BETA2 = 0.99  # of those that search μ or the like in its place


@dataclass(frozen=True)
class Entry:
    """One compared optimizer.

    Attributes:
        family: whose learning rates it takes: "adam", "lion", "muon" or "sgd".
        fifth: name of the fifth setting.
        fifth_range: where it is searched.
        make: from parameter groups ("matrix" says whether Muon may step it) and settings.
        source: the package it is from.
        fixed: settings that are not searched.
    """

    family: str
    fifth: str
    fifth_range: tuple[float, float]
    make: Callable[[Groups, Settings], Optimizer]
    source: str = "torch"
    fixed: tuple[tuple[str, float], ...] = ()


@cache
def _cube() -> list[list[float]]:
    from scipy.stats import qmc

    return qmc.Sobol(5, scramble=True, seed=29).random_base2(5)[:TRIALS].tolist()


def trial_settings(name: str, task: Task, trial: int) -> Settings:
    """Return the settings of a trial, 0 to `TRIALS` − 1, of the scrambled Sobol sequence."""
    entry, point = OPTIMIZERS[name], _cube()[trial]
    centre = task.lr[entry.family]
    # The same strength of decay for all: the box of lr·λ has the same centre as AdamW's.
    decay = 0.08 * task.lr["adam"] / centre
    ranges = {
        "lr": (centre / 8, centre * 8),
        "warmup": _WARMUP,
        "1-beta1": _REST_OF_BETA1,
        "weight_decay": (decay / 8, decay * 8),
        entry.fifth: entry.fifth_range,
    }
    values = {
        key: low * (high / low) ** share
        for (key, (low, high)), share in zip(ranges.items(), point, strict=True)
    }
    for key in ("beta1", "beta2"):
        if f"1-{key}" in values:
            values[key] = 1 - values.pop(f"1-{key}")
    return {key: float(f"{value:.5g}") for key, value in (values | dict(entry.fixed)).items()}


def at_edge(name: str, task: Task, settings: Settings) -> bool:
    """Return whether a learning rate lies within a tenth of the box's end: a wider box might have served better."""
    place = math.log(settings["lr"] * 8 / task.lr[OPTIMIZERS[name].family]) / math.log(64)
    return not 0.1 < place < 0.9


def available(task: Task) -> list[str]:
    """Return the names of the optimizers that can train a task, the most wanted first."""
    return [name for name in task.optimizers or OPTIMIZERS if OPTIMIZERS[name].family in task.lr]


def build(name: str, problem: Problem, settings: Settings) -> Optimizer:
    """Return an optimizer of a problem's module; weight decay is for its matrices.

    Raises:
        ImportError: without the package that it is from.
    """
    matrices = {id(parameter) for parameter in problem.matrices()}
    groups: Groups = []
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in problem.module.parameters():
        kinds.setdefault((id(parameter) in matrices, parameter.ndim >= 2), []).append(parameter)
    for (matrix, decayed), parameters in kinds.items():
        decay = settings["weight_decay"] if decayed else 0.0
        groups.append({"params": parameters, "weight_decay": decay, "matrix": matrix})
    make = OPTIMIZERS[name].make if name in OPTIMIZERS else FEW_BITS[name][1]
    return make(groups, settings)


def _plain(groups: Groups) -> Groups:
    return [{key: value for key, value in group.items() if key != "matrix"} for group in groups]


def _betas(s: Settings) -> tuple[float, float]:
    return s["beta1"], s.get("beta2", _BETA2)


def _arsg(preconditioner: str, **more: Any) -> Callable[[Groups, Settings], Optimizer]:
    def make(groups: Groups, s: Settings) -> Optimizer:
        return ARSG(
            _plain(groups),
            lr=s["lr"],
            betas=_betas(s),
            mu=s["mu"],
            preconditioner=preconditioner,  # type: ignore[arg-type]
            decoupled_weight_decay=True,
            **more,
        )

    return make


def _remote(inner: Callable[[Groups, Settings], Optimizer]) -> Callable[[Groups, Settings], Optimizer]:
    """Around an optimizer without momentum, whose learning rate is α·μ; μ is raised to 1 − β1, its least."""

    def make(groups: Groups, s: Settings) -> Optimizer:
        mu = min(1.0, max(s["mu"], 1 - s["beta1"]))
        # The average moves the parameters 1/μ times as far, the decay within it too: αλ is as for the others.
        return RemoteObservation(
            inner(groups, s | {"lr": s["lr"] * mu, "beta1": 0.0}), mu=mu, beta1=s["beta1"]
        )

    return make


def _adamw(**fixed: Any) -> Callable[[Groups, Settings], Optimizer]:
    return lambda groups, s: torch.optim.AdamW(_plain(groups), lr=s["lr"], betas=_betas(s), **fixed)


def _sgd(groups: Groups, s: Settings) -> Optimizer:
    rest = 1 - s["beta1"]
    return torch.optim.SGD(
        _plain(groups), lr=s["lr"] * rest, momentum=s["beta1"], nesterov=s["nesterov"] >= 0.5
    )


def _nadamw(groups: Groups, s: Settings) -> Optimizer:
    return torch.optim.NAdam(_plain(groups), lr=s["lr"], betas=_betas(s), decoupled_weight_decay=True)


def _lion(groups: Groups, s: Settings) -> Optimizer:
    return Lion(_plain(groups), lr=s["lr"], betas=_betas(s))


def _theirs(
    name: str, settings: Callable[[Settings], dict[str, Any]]
) -> Callable[[Groups, Settings], Optimizer]:
    def make(groups: Groups, s: Settings) -> Optimizer:
        try:
            import pytorch_optimizer
        except ImportError:
            raise ImportError(f"{name} is pytorch_optimizer's: pip install 'arsg-dist[evidence]'") from None
        kind = getattr(pytorch_optimizer, name)
        groups = groups if name == "Muon" else _plain(groups)
        return kind(groups, **({"lr": s["lr"]} | settings(s)))

    return make


def _muon(groups: Groups, s: Settings) -> Optimizer:
    """Muon for hidden matrices, AdamW at `ratio` × 1/4 of its rate for the others."""
    with_flags = []
    for group in groups:
        own = {key: value for key, value in group.items() if key != "matrix"} | {"use_muon": group["matrix"]}
        if not group["matrix"]:
            own |= {"lr": s["lr"] * s["ratio"] / 4, "betas": (min(s["beta1"], 0.9), 0.99), "eps": 1e-8}
        with_flags.append(own)
    _orthogonalise_in_float32()
    more = {"momentum": s["beta1"], "nesterov": s["beta1"] > 0}
    return _theirs("Muon", lambda _: more)(with_flags, s)


@cache
def _orthogonalise_in_float32() -> None:
    """Let Muon compute in float32: in bfloat16 a processor without it takes five times as long, for less precision."""
    from pytorch_optimizer.optimizer.muon import base

    base.zero_power_via_newton_schulz_5 = partial(base.zero_power_via_newton_schulz_5, dtype=torch.float32)


def _muon_without_ratio(groups: Groups, s: Settings) -> Optimizer:
    return _muon(groups, s | {"ratio": 1.0})


def _lookahead(groups: Groups, s: Settings) -> Optimizer:
    import pytorch_optimizer

    inner = torch.optim.AdamW(_plain(groups), lr=s["lr"], betas=(s["beta1"], _BETA2))
    return pytorch_optimizer.Lookahead(inner, k=5, alpha=s["alpha"])


def _eight_bit_adamw(module: str) -> Callable[[Groups, Settings], Optimizer]:
    """Of a package that is not in the extra: both bring compilers or libraries of their own."""

    def make(groups: Groups, s: Settings) -> Optimizer:
        try:
            kind = importlib.import_module(module).AdamW8bit
        except ImportError as error:
            raise ImportError(f"{error}; pip install torchao bitsandbytes") from None
        return kind(_plain(groups), lr=s["lr"], betas=_betas(s))

    return make


_WITH_BETA2 = ("1-beta2", _REST_OF_BETA2)
_WITH_MU = ("mu", _MU)
_PEER, _OURS = "pytorch_optimizer", "arsg_dist"

OPTIMIZERS: dict[str, Entry] = {
    "AdamW": Entry("adam", *_WITH_BETA2, _adamw()),
    "RemoteObservation(AdamW)": Entry("adam", *_WITH_MU, _remote(_adamw()), _OURS),
    "ARSG adam": Entry("adam", *_WITH_MU, _arsg("adam"), _OURS),
    "ARSG": Entry("adam", *_WITH_MU, _arsg("amsgrad"), _OURS),
    "QHAdam": Entry(
        "adam",
        *_WITH_MU,
        _theirs("QHAdam", lambda s: {"betas": _betas(s), "nus": (1 - s["mu"], 1.0), "weight_decouple": True}),
        _PEER,
    ),
    "NAdamW": Entry("adam", *_WITH_BETA2, _nadamw),
    "Lion": Entry("lion", *_WITH_BETA2, _lion, _OURS),
    "RemoteObservation(Lion)": Entry("lion", *_WITH_MU, _remote(_lion), _OURS),
    "Schedule-Free AdamW": Entry(
        "adam",
        *_WITH_BETA2,
        _theirs("ScheduleFreeAdamW", lambda s: {"betas": _betas(s), "warmup_steps": int(s["warmup_steps"])}),
        _PEER,
    ),
    "Simplified AdEMAMix": Entry(
        "adam",
        *_WITH_MU,
        _theirs(
            "SimplifiedAdEMAMix",
            # its numerator is m + alpha·g: the same as ARSG's over 1 − μ
            lambda s: {
                "lr": s["lr"] * (1 - s["mu"]),
                "betas": _betas(s),
                "alpha": s["mu"] / (1 - s["mu"]),
            },
        ),
        _PEER,
    ),
    "LaProp": Entry("adam", *_WITH_BETA2, _theirs("LaProp", lambda s: {"betas": _betas(s)}), _PEER),
    "Lookahead(AdamW)": Entry("adam", "alpha", (0.0625, 1.0), _lookahead, _PEER),
    "AMSGrad": Entry("adam", *_WITH_BETA2, _adamw(amsgrad=True)),
    "SGD": Entry("sgd", "nesterov", (0.125, 2.0), _sgd),
    "RSG": Entry("sgd", *_WITH_MU, _arsg("none"), _OURS),
    "ARSGB": Entry("adam", "mu", _BOOSTED_MU, _arsg("amsgrad"), _OURS),
    "Muon": Entry("muon", "ratio", _RATIO, _muon, _PEER),
    "RemoteObservation(Muon)": Entry("muon", *_WITH_MU, _remote(_muon_without_ratio), _OURS),
    "ARSG, paper's β1 and μ": Entry(
        "adam", *_WITH_MU, _arsg("amsgrad"), _OURS, (("beta1", 0.999), ("mu", 0.1))
    ),
    "ARSG, paper's β1 and μ, Beta1Warmup": Entry(
        "adam", *_WITH_MU, _arsg("amsgrad"), _OURS, (("beta1", 0.999), ("mu", 0.1))
    ),
}
"""Name → entry, the most wanted first: a study that is cut short has whole rows."""

FEW_BITS: dict[str, tuple[str, Callable[[Groups, Settings], Optimizer]]] = {
    "ARSG adam, bf16 state": ("ARSG adam", _arsg("adam", state_dtype="bfloat16")),
    "ARSG adam, 8-bit state": ("ARSG adam", _arsg("adam", state_dtype="8bit")),
    "ARSG, bf16 state": ("ARSG", _arsg("amsgrad", state_dtype="bfloat16")),
    "ARSG, 8-bit state": ("ARSG", _arsg("amsgrad", state_dtype="8bit")),
    "torchao's AdamW8bit": ("AdamW", _eight_bit_adamw("torchao.optim")),
    "bitsandbytes' AdamW8bit": ("AdamW", _eight_bit_adamw("bitsandbytes.optim")),
}
"""Name → whose winner's settings it takes and is compared with, and how it is made; not tuned itself."""

BOOSTED, RAISED = "ARSGB", "ARSG, paper's β1 and μ, Beta1Warmup"
"""Those whose settings move during a run, beside the learning rate."""
