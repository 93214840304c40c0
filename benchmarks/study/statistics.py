"""What the numbers of a few seeds say, and what they cannot say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Return whether 0 is outside."""
        return self.low > 0 or self.high < 0


def paired(differences: Sequence[float]) -> Interval:
    """Return the mean of paired differences with a 95 % bootstrap interval (percentiles, scipy.stats.bootstrap).

    The interval is widened by √(n/(n−1)) and the ratio of Student's quantile to the normal one: resampling five values
    understates the spread, and their mean would "differ" too often.
    """
    from scipy import stats

    values = np.asarray(differences, dtype=float)
    mean, count = float(values.mean()), len(values)
    if count < 2 or np.ptp(values) == 0:
        return Interval(mean, mean, mean) if count > 1 else Interval(mean, -math.inf, math.inf)
    found = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=0.95,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(0),
    ).confidence_interval
    wider = math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975)
    return Interval(mean, mean - wider * (mean - float(found.low)), mean + wider * (float(found.high) - mean))


def detectable(differences: Sequence[float], seeds: int) -> float:
    """Return the smallest mean difference that so many seeds show in 80 of 100 studies (two-sided, 5 %).

    Args:
        differences: paired ones of a pilot, for their spread.
        seeds: of the study.
    """
    from scipy import stats

    spread = float(np.std(np.asarray(differences, dtype=float), ddof=1))
    quantiles = stats.t.ppf(0.975, seeds - 1) + stats.t.ppf(0.8, seeds - 1)
    return float(quantiles) * spread / math.sqrt(seeds)


def updates_to(curve: Sequence[float | None], target: float, updates: int) -> float | None:
    """Return after how many updates a curve is at or below a target, for good or not; None if it never is.

    Args:
        curve: losses at evenly spaced updates, the last at the end.
        target: the loss to reach. Between two points the curve is taken as straight.
        updates: of the run.
    """
    spacing, before = updates / len(curve), None
    for number, loss in enumerate(curve, start=1):
        if loss is None:
            return None
        if loss <= target:
            if before is None:
                return spacing
            return spacing * (number - 1 + (before - target) / (before - loss))
        before = loss
    return None
