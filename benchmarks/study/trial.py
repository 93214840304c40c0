"""One run of one optimizer on one task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from arsg_dist import ARSG, Beta1Warmup, ObservationBoost, RemoteObservation
from benchmarks.study.optimizers import BOOSTED, RAISED, Settings, build
from benchmarks.study.problem import Task

POINTS = 25
"""Of a curve."""


def train(
    task: Task, name: str, settings: Settings, seed: int, data: Path | None, curve: bool
) -> dict[str, Any]:
    """Train once.

    The learning rate rises linearly over the share `warmup` of the updates and falls to 0 as a cosine. Schedule-Free
    keeps it after its own warm-up, and is evaluated in its evaluation mode.

    Args:
        task: what is learned.
        name: of the optimizer.
        settings: of the optimizer.
        seed: of weights and batches.
        data: directory of the data sets.
        curve: evaluate on the way, and at θ and on the training part at the end.

    Returns:
        val (at the end), seconds (of this process); with `curve` also curve (validation at `POINTS` evenly spaced
        updates), train, half (validation after half of the updates), and the three at θ, `..._theta`, for optimizers
        with a base iterate: at the end, with a learning rate of 0, θ is x. A run whose loss is not
        finite, or ten times what it was at first, ends: val is then null.
    """
    begin = time.process_time()
    problem = task.make(seed, data)
    own_schedule = name == "Schedule-Free AdamW"
    if own_schedule:
        settings = settings | {"warmup_steps": max(1, round(settings["warmup"] * task.updates))}
    optimizer = build(name, problem, settings)
    schedule = _Schedule(
        optimizer, name, task.updates, 0.0 if own_schedule else settings["warmup"], own_schedule
    )
    first, points = None, []
    result: dict[str, Any] = {}
    parameters = list(problem.module.parameters())
    for update in range(task.updates):
        schedule.set(update)
        _mode(optimizer, training=True)
        optimizer.zero_grad(set_to_none=True)
        loss = problem.batch_loss(update)
        loss.backward()
        if task.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, task.clip)
        optimizer.step()
        value = float(loss.detach())
        first = abs(value) if first is None else first
        # a quadratic's batch losses may be below 0 and its distance grows from 0: only what is far off ends it
        if not math.isfinite(value) or value > 10 * max(first, 1.0) + (1e4 if task.exact else 0):
            return {"val": None, "diverged_at": update + 1, "seconds": _since(begin)} | (
                {"curve": points} if curve else {}
            )
        if curve and (update + 1) * POINTS // task.updates > update * POINTS // task.updates:
            points.append(_evaluated(optimizer, lambda: problem.validation_loss(False)))
        if curve and update + 1 == task.updates // 2:
            result["half"] = _evaluated(optimizer, lambda: problem.validation_loss(True))
            result |= _at_base_iterate(optimizer, half=lambda: problem.validation_loss(True))
    result["val"] = _evaluated(optimizer, lambda: problem.validation_loss(True))
    if curve:
        result["curve"] = points
        result["train"] = _evaluated(optimizer, problem.training_loss)
        result |= _at_base_iterate(
            optimizer, val=lambda: problem.validation_loss(True), train=problem.training_loss
        )
    if result["val"] is not None and not math.isfinite(result["val"]):
        result["val"] = None
    return result | {"seconds": _since(begin)}


class _Schedule:
    """The learning rate of every update, and what else moves."""

    def __init__(self, optimizer: Optimizer, name: str, updates: int, warmup: float, constant: bool) -> None:
        self._optimizer, self._updates, self._constant = optimizer, updates, constant
        self._warmup = max(1, round(warmup * updates))
        self._lrs = [group["lr"] for group in optimizer.param_groups]
        self._boost = ObservationBoost(optimizer, milestones=[1]) if name == BOOSTED else None
        self._raise = Beta1Warmup(optimizer, warmup_steps=updates) if name == RAISED else None

    def set(self, update: int) -> None:
        """Set what the given update is made with; call for every one from 0 on."""
        if self._boost is not None and update == self._updates // 4:
            before = [group["lr"] for group in self._optimizer.param_groups]
            self._boost.step()
            after = [group["lr"] for group in self._optimizer.param_groups]
            self._lrs = [lr * new / old for lr, new, old in zip(self._lrs, after, before, strict=True)]
        if self._raise is not None and update:
            self._raise.step()
        if self._constant:
            return
        if update < self._warmup:
            factor = (update + 1) / self._warmup
        else:
            done = (update - self._warmup + 0.5) / (self._updates - self._warmup)
            factor = (1 + math.cos(math.pi * done)) / 2
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * factor


def _mode(optimizer: Optimizer, training: bool) -> None:
    if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
        (optimizer.train if training else optimizer.eval)()


def _evaluated(optimizer: Optimizer, loss: Callable[[], float]) -> float | None:
    _mode(optimizer, training=False)
    value = _rounded(loss())
    _mode(optimizer, training=True)
    return value


def _at_base_iterate(optimizer: Optimizer, **losses: Callable[[], float]) -> dict[str, float | None]:
    if not isinstance(optimizer, ARSG | RemoteObservation):
        return {}
    with optimizer.base_iterate():
        return {f"{name}_theta": _rounded(loss()) for name, loss in losses.items()}


def _rounded(value: float) -> float | None:
    return float(f"{value:.5f}") if math.isfinite(value) else None


def _since(begin: float) -> float:
    return round(time.process_time() - begin, 2)
