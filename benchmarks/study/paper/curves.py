"""Curves that were written, and the numbers taken from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.study.paper.run import Run
from benchmarks.study.paper.study import Study


@dataclass(frozen=True)
class Curve:
    """A finished run.

    Attributes:
        label: of its variant in the study.
        run: what was run.
        device: name of the device.
        epochs: records of its epochs, without the batch losses.
        losses: the loss of every batch, in order.
        diverged: a loss was not finite.
    """

    label: str
    run: Run
    device: str
    epochs: list[dict[str, Any]]
    losses: list[float]
    diverged: bool

    @property
    def updates_per_epoch(self) -> int:
        """Updates in an epoch."""
        return len(self.losses) // len(self.epochs)

    def smoothed(self) -> list[float]:
        """The training loss: mean of the batch losses over one epoch, ending at each update from the first epoch on.

        Item 0 belongs to the last update of epoch 1.
        """
        return trailing_means(self.losses, self.updates_per_epoch)

    @property
    def train_loss(self) -> float:
        """Mean of the batch losses of the last epoch."""
        return self.smoothed()[-1]

    def updates_to_reach(self, loss: float) -> int | None:
        """After how many updates the training loss is at or below `loss`; None if never."""
        return first_at_or_below(self.smoothed(), loss, self.updates_per_epoch)


def trailing_means(values: Sequence[float], window: int) -> list[float]:
    """The mean of each `window` values in a row."""
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[i - window]) / window for i in range(window, len(sums))]


def first_at_or_below(smoothed: Sequence[float], loss: float, window: int) -> int | None:
    """The number of the first update (from 1) whose trailing mean over `window` updates is at most `loss`."""
    found = next((index for index, value in enumerate(smoothed) if value <= loss), None)
    return None if found is None else found + window


def read_curves(study: Study, output: Path, device: str) -> list[Curve]:
    """Those of the seeds that are complete, in the order of the study's members: equals are compared."""
    curves = []
    missing = {m.run.seed for m in study.members if not (output / m.run.file_name(device)).is_file()}
    for member in study.members:
        if member.run.seed in missing:
            continue
        path = output / member.run.file_name(device)
        head, *records = (json.loads(line) for line in path.read_text().splitlines())
        losses = [loss for record in records for loss in record.pop("batch_losses")]
        diverged = any(record.get("diverged") for record in records)
        curves.append(Curve(member.label, member.run, head["device"], records, losses, diverged))
    return curves


def by_label(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Label → its curves."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.label, []).append(curve)
    return groups


def share_of_updates(curve: Curve, baseline: Curve) -> float | None:
    """Updates the curve needs to reach the baseline's final training loss, as a share of the baseline's updates."""
    updates = None if curve.diverged else curve.updates_to_reach(baseline.train_loss)
    return None if updates is None else updates / len(baseline.losses)


def spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    """Median, and in brackets the smallest and the largest of several values."""
    median = shown(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({shown(min(values))} to {shown(max(values))})"
