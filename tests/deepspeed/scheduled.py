"""Schedules of DeepSpeed configs, each with the single process that has to go through the same settings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.runtime import lr_schedules
from torch import Tensor
from torch.optim import lr_scheduler

from arsg_dist import ARSG
from arsg_dist.optim import Beta1Warmup, LossPlateau, ObservationBoost
from tests.deepspeed.jobs.common import weights_of
from tests.support import toy

UPDATES = 12
SAVE_AT = 7  # updates, after which a second run goes on from a checkpoint
OVERFLOW_AT = 2  # the update whose loss is infinite, in fp16
SETTINGS: dict[str, Any] = {"lr": 0.02, "eps": 1e-3, "mu": 0.05, "betas": [0.99, 0.99]}
PLATEAU = {"smoothing": 0.5, "threshold": 0.9, "patience": 1}  # so much that the loss soon counts as flat


def groups_of(named: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups, with different lr, β1 and μ."""
    return [
        {"params": [value for name, value in named.items() if name.endswith("weight")]},
        {
            "params": [value for name, value in named.items() if name.endswith("bias")],
            "lr": 0.01,
            "mu": 0.1,
            "betas": [0.95, 0.99],
        },
    ]


Build = Callable[[ARSG], list[Any]]


@dataclass(frozen=True)
class Case:
    """A schedule.

    Attributes:
        section: of the config, or None with `client`.
        build: what a single process builds instead: schedulers to step in this order after each update.
        client: passed as lr_scheduler=... instead of a section.
        fp16: with an update that overflows, at which the schedule has to stand still.
    """

    section: dict[str, Any] | None
    build: Build
    client: Callable[[Any], Any] | None = None
    fp16: bool = False
    stages: tuple[int, ...] = field(default=(0, 1, 2, 3))


def _section(kind: str, **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": params}


def _chain(*sections: dict[str, Any]) -> dict[str, Any]:
    return _section("ChainedScheduler", schedulers=list(sections))


WARMUP = {"warmup_num_steps": 4, "warmup_type": "linear"}
CYCLE = {
    "cycle_min_lr": 0.001,
    "cycle_max_lr": [0.02, 0.01],
    "cycle_first_step_size": 3,
    "decay_step_size": 2,
    "decay_lr_rate": 0.1,
    "cycle_momentum": False,
}
BOOST = _section("ObservationBoost", milestones=[5])
PLATEAU_BOOST = _section("ObservationBoost", plateau=PLATEAU, observe_every=2, max_boosts=2)


class _RescaledWarmup:
    """DeepSpeed's WarmupLR whose lr a boost scales, written out."""

    def __init__(self, optimizer: ARSG, boost: ObservationBoost) -> None:
        self.optimizer, self.boost = optimizer, boost
        self.warmup = lr_schedules.WarmupLR(optimizer, **WARMUP)
        self.scales = [1.0] * len(optimizer.param_groups)

    def step(self) -> None:
        self.warmup.step()
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] *= scale
        boosted, lrs = self.boost.boosts, [group["lr"] for group in self.optimizer.param_groups]
        self.boost.step()
        if self.boost.boosts > boosted:
            for i, group in enumerate(self.optimizer.param_groups):
                self.scales[i] *= group["lr"] / lrs[i]


def _warmup_and_boost(optimizer: ARSG) -> list[Any]:
    lrs = [group["lr"] for group in optimizer.param_groups]
    boost = ObservationBoost(optimizer, [5])
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        assert group["lr"] == lr
    return [_RescaledWarmup(optimizer, boost)]


def _sequence(optimizer: ARSG) -> list[Any]:
    members = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
    ]
    sequence = lr_scheduler.SequentialLR(optimizer, members, milestones=[3])
    return [sequence, ObservationBoost(optimizer, [5], rescale=[sequence])]


CASES: dict[str, Case] = {
    "WarmupLR": Case(_section("WarmupLR", **WARMUP), lambda o: [lr_schedules.WarmupLR(o, **WARMUP)]),
    "WarmupDecayLR": Case(
        _section("WarmupDecayLR", total_num_steps=10, warmup_max_lr=[0.02, 0.01], **WARMUP),
        lambda o: [lr_schedules.WarmupDecayLR(o, 10, warmup_max_lr=[0.02, 0.01], **WARMUP)],
    ),
    "WarmupCosineLR": Case(
        _section("WarmupCosineLR", total_num_steps=10, **WARMUP),
        lambda o: [lr_schedules.WarmupCosineLR(o, 10, **WARMUP)],
    ),
    "LRRangeTest": Case(
        _section("LRRangeTest", lr_range_test_min_lr=[0.002, 0.001], lr_range_test_step_size=3),
        lambda o: [lr_schedules.LRRangeTest(o, [0.002, 0.001], 3)],
    ),
    "OneCycle": Case(_section("OneCycle", **CYCLE), lambda o: [lr_schedules.OneCycle(o, **CYCLE)]),
    "StepLR": Case(
        _section("StepLR", step_size=4, gamma=0.3), lambda o: [lr_scheduler.StepLR(o, 4, gamma=0.3)]
    ),
    "OneCycleLR": Case(
        _section("OneCycleLR", max_lr=0.02, total_steps=20, cycle_momentum=False),
        lambda o: [lr_scheduler.OneCycleLR(o, 0.02, total_steps=20, cycle_momentum=False)],
    ),
    "StepLR in fp16 with an overflow": Case(
        _section("StepLR", step_size=3), lambda o: [lr_scheduler.StepLR(o, 3)], fp16=True
    ),
    "ObservationBoost": Case(BOOST, lambda o: [ObservationBoost(o, [5])]),
    "Beta1Warmup": Case(
        _section("Beta1Warmup", warmup_steps=9, start=0.5), lambda o: [Beta1Warmup(o, 9, 0.5)]
    ),
    "plateau": Case(
        PLATEAU_BOOST, lambda o: [ObservationBoost(o, plateau=LossPlateau(**PLATEAU), max_boosts=2)]
    ),
    "everything of ours": Case(
        _chain(_section("CosineAnnealingLR", T_max=12), _section("Beta1Warmup", warmup_steps=4), BOOST),
        lambda o: [
            lr_scheduler.CosineAnnealingLR(o, 12),
            Beta1Warmup(o, 4),
            ObservationBoost(o, [5]),
        ],
    ),
    "warm-up and boost": Case(_chain(_section("WarmupLR", **WARMUP), BOOST), _warmup_and_boost),
    "sequence and boost": Case(
        _chain(
            _section(
                "SequentialLR",
                schedulers=[
                    _section("LinearLR", start_factor=0.1, total_iters=3),
                    _section("CosineAnnealingLR", T_max=9),
                ],
                milestones=[3],
            ),
            BOOST,
        ),
        _sequence,
    ),
    "callable": Case(
        None,
        lambda o: [lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))],
        client=lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ),
}


def settings_of(optimizer: Any) -> list[list[float]]:
    """lr, μ and both β of every group."""
    return [
        [float(group["lr"]), float(group["mu"]), *map(float, group["betas"])]
        for group in optimizer.param_groups
    ]


def loss_of(model: Any, update: int, part: slice, dtype: torch.dtype, overflow: bool) -> Tensor:
    """The mean loss of a part of an update's batch."""
    inputs, targets = toy.batch(update)
    loss = toy.loss_of(model(inputs[part].to(dtype)), targets[part])
    return loss * float("inf") if overflow and update == OVERFLOW_AT else loss


def single_process(name: str) -> tuple[list[Any], dict[str, Tensor], list[Any]]:
    """Settings used in every update, the weights at the end, and the settings after it."""
    case = CASES[name]
    model = toy.build_model()
    named = dict(model.named_parameters())
    optimizer = ARSG(groups_of(named), **SETTINGS, foreach=False, fused=False)
    schedulers = case.build(optimizer)
    used = []
    for update in range(UPDATES):
        used.append(settings_of(optimizer))
        if case.fp16 and update == OVERFLOW_AT:
            continue
        optimizer.zero_grad()
        loss = loss_of(model, update, slice(None), torch.float32, overflow=False)
        loss.backward()
        optimizer.step()
        for scheduler in schedulers:
            if isinstance(scheduler, ObservationBoost) and scheduler.plateau is not None:
                scheduler.record(loss)
                if update % 2 == 0:  # observe_every = 2
                    continue
            scheduler.step()
    return used, weights_of(model), settings_of(optimizer)
