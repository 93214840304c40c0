"""Calibrate the model on measurements of rehearsal hosts, and say how wrong it is where it was not fitted.

Fitted are, per library and collective, latency per hop, slowdown of the link and handling per byte (`Cost`), then, per
strategy, overhead and overlap (`Behaviour`): each by linear least squares on relative errors. Fitted to: jobs on 1, 2
and 4 hosts at 100 Mbit/s and 2 Gbit/s (in between, all that can be hidden lasts longer than the passes, and overhead
and overlap could not be told apart). Everything else only checks: all of 1 Gbit/s, all of 3 hosts, all of two hosts
with two ranks each, and with them the two-level form, of which no figure is fitted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from benchmarks.common.kept_results import write_report
from benchmarks.scaling.collectives import Cluster, Cost, Exchange, Link, features, seconds
from benchmarks.scaling.job import BACKWARD, BUCKET, FORWARD, LAYERS, WIDTH
from benchmarks.scaling.model import Behaviour, communication, step_seconds
from benchmarks.scaling.traffic import Load

LOAD = Load((WIDTH * WIDTH,) * LAYERS, LAYERS * FORWARD, LAYERS * BACKWARD, bucket=BUCKET)
CORES = 2
"""Of the machine that all rehearsal hosts were on."""
_STRATEGY = {"horovod": "ddp"}
"""Names of measured steps that the model calls otherwise."""
_BORROWED = {"horovod-two-level": "horovod-sharded"}
"""Strategies that nothing was measured of to fit to, and whose behaviour they are predicted with."""

Costs = dict[str, dict[str, Cost]]
Behaviours = dict[str, Behaviour]


@dataclass(frozen=True)
class Row:
    """A measurement and what the model says of it.

    Attributes:
        stack: "torch" or "horovod".
        hosts: number of hosts.
        per_host: ranks on each.
        rate: Mbit/s of a cable.
        name: collective and bytes, or strategy.
        measured: seconds, the median.
        predicted: seconds.
    """

    stack: str
    hosts: int
    per_host: int
    rate: int
    name: str
    measured: float
    predicted: float = 0.0

    @property
    def ranks(self) -> int:
        """Of the job."""
        return self.hosts * self.per_host

    @property
    def fitted_to(self) -> bool:
        """Whether the calibration may look at it."""
        return self.rate in (100, 2000) and (self.hosts, self.per_host) in ((1, 2), (2, 1), (4, 1))

    @property
    def error(self) -> float:
        """Relative, of the prediction."""
        return self.predicted / self.measured - 1


def rehearsal(row: Row, costs: dict[str, Cost]) -> Cluster:
    """The hosts a measurement was taken on. What a link costs beside its rate is in the costs."""
    return Cluster(
        ranks_per_node=row.per_host,
        inside=Link(0.0, 1e15),
        between=Link(0.0, row.rate * 1e6 / 8),
        costs=costs,
        cores=CORES,
        two_pass_reduce_scatter=row.stack == "torch",
        reduce_scatter_by_all_to_all=row.stack == "horovod",
    )


def least_squares(columns: Iterable[Sequence[float]], wanted: Sequence[float], upper: Sequence[float]) -> Any:
    """Non-negative factors of the columns, for the smallest sum of squares of relative errors."""
    weights = 1 / np.asarray(wanted)
    matrix = np.column_stack([np.asarray(column) * weights for column in columns])
    scale = np.where(matrix.any(axis=0), np.abs(matrix).max(axis=0), 1.0)
    found = lsq_linear(matrix / scale, np.ones(len(weights)), (0, np.asarray(upper) * scale), method="bvls")
    return found.x / scale


def fit_cost(cluster_of: Any, rows: Sequence[Row]) -> Cost:
    """The cost of one collective, from rows whose names are "OPERATION BYTES".

    Args:
        cluster_of: row -> the cluster it was measured on, without costs.
        rows: measurements.
    """
    seen = [features(cluster_of(row), exchange_of(row), row.ranks) for row in rows]
    _, hops, on_links, handled = zip(*seen, strict=True)
    limits = (np.inf, np.inf, np.inf)
    return Cost(*map(float, least_squares((hops, on_links, handled), [row.measured for row in rows], limits)))


def exchange_of(row: Row) -> Exchange:
    """The collective of a row."""
    operation, size = row.name.split()
    return Exchange(operation, int(size), 1, "nothing")  # type: ignore[arg-type]


def fit_behaviour(strategy: str, load: Load, rows: Sequence[tuple[Cluster, int, float]]) -> Behaviour:
    """Overhead and overlap of a strategy, from (cluster, ranks, measured seconds of a step)."""
    exposed, hideable = zip(*(communication(strategy, load, c, ranks) for c, ranks, _ in rows), strict=True)
    measured = np.array([seconds for _, _, seconds in rows])
    least = load.forward + load.backward + np.array(exposed)
    # measured = least + overhead − overlap × hideable, relative to what was measured
    matrix = np.column_stack([1 / measured, -np.array(hideable) / measured])
    found = lsq_linear(matrix, 1 - least / measured, ([0.0, 0.0], [np.inf, 1.0]), method="bvls")
    return Behaviour(*map(float, found.x))


def read(folder: Path) -> tuple[list[Row], list[Row]]:
    """Collectives and steps of all files; barriers are left out."""
    collectives: list[Row] = []
    steps: list[Row] = []
    for path in sorted(folder.glob("*-*x*.json")):
        for found in json.loads(path.read_text())["rows"]:
            if found["name"].startswith("barrier"):
                continue
            place = {key: found[key] for key in ("stack", "hosts", "per_host", "rate", "name")}
            row = Row(**place, measured=statistics.median(found["seconds"]))
            (collectives if found["kind"] == "collective" else steps).append(row)
    return collectives, steps


def calibrate(collectives: list[Row], steps: list[Row]) -> tuple[Costs, Behaviours]:
    """Costs by stack and operation, and behaviours by "STACK STRATEGY"."""
    costs: Costs = {}
    for stack, operation in sorted({(row.stack, row.name.split()[0]) for row in collectives}):
        rows = [r for r in collectives if r.fitted_to and (r.stack, r.name.split()[0]) == (stack, operation)]
        costs.setdefault(stack, {})[operation] = fit_cost(lambda row: rehearsal(row, {}), rows)
    behaviours = {}
    for stack, name in sorted({(row.stack, row.name) for row in steps}):
        rows = [r for r in steps if r.fitted_to and (r.stack, r.name) == (stack, name) and r.hosts > 1]
        if rows:
            seen = [(rehearsal(row, costs[stack]), row.ranks, row.measured) for row in rows]
            behaviours[f"{stack} {name}"] = fit_behaviour(_STRATEGY.get(name, name), LOAD, seen)
    return costs, behaviours


def predicted(
    collectives: list[Row], steps: list[Row], costs: Costs, behaviours: Behaviours
) -> tuple[list[Row], list[Row]]:
    """The rows with predictions."""
    done_collectives = [
        replace(row, predicted=seconds(rehearsal(row, costs[row.stack]), exchange_of(row), row.ranks))
        for row in collectives
    ]
    done_steps = []
    for row in steps:
        own, borrowed = f"{row.stack} {row.name}", f"{row.stack} {_BORROWED.get(row.name, row.name)}"
        behaviour = behaviours[own if own in behaviours else borrowed]
        strategy, cluster = _STRATEGY.get(row.name, row.name), rehearsal(row, costs[row.stack])
        done_steps.append(replace(row, predicted=step_seconds(strategy, LOAD, cluster, row.ranks, behaviour)))
    return done_collectives, done_steps


def error_rows(rows: list[Row], key: Any) -> list[str]:
    """A table's rows: errors per key, where fitted and where not."""
    lines = []
    for value in sorted({key(row) for row in rows}):
        cells = [value]
        for fitted in (True, False):
            mine = [row for row in rows if key(row) == value and row.fitted_to is fitted]
            if not mine:
                cells += ["–", "–"]
                continue
            worst = max(mine, key=lambda row: abs(row.error))
            place = f"{worst.hosts} × {worst.per_host}, {worst.rate} Mbit/s"
            place += f", {int(worst.name.split()[1]) >> 10} kB" if " " in worst.name else ""
            cells += [
                f"{statistics.median(abs(row.error) for row in mine):.0%} of {len(mine)}",
                f"{worst.error:+.0%} ({place})",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(collectives: list[Row], steps: list[Row], costs: Costs, behaviours: Behaviours) -> str:
    """Markdown: what was fitted and how large the errors are."""
    head = "| fitted to: median error | worst | not fitted to: median error | worst |"
    lines = [
        "# Calibration of the scaling model",
        "",
        "Command: `python -m benchmarks.scaling fit`.",
        "",
        "| library, collective | latency ms per hop | slowdown of the link | handling ns/byte |",
        "|---|---|---|---|",
    ]
    for stack, operations in costs.items():
        for name, cost in operations.items():
            lines.append(
                f"| {stack} {name} | {1e3 * cost.latency:.2f} | {cost.slowdown:.2f} | {1e9 * cost.handling:.2f} |"
            )
    lines += ["", "| library, strategy | overhead ms | overlap |", "|---|---|---|"]
    for name, behaviour in behaviours.items():
        lines.append(f"| {name} | {1e3 * behaviour.overhead:.0f} | {behaviour.overlap:.2f} |")
    large = [row for row in collectives if int(row.name.split()[1]) >= 1 << 20]
    small = [row for row in collectives if int(row.name.split()[1]) < 1 << 20]
    tables = (("steps", steps), ("collectives of 1 and 8 MB", large), ("collectives of 16 kB", small))
    for title, rows in tables:
        lines += ["", f"| {title} {head}", "|---|---|---|---|---|"]
        lines += error_rows(rows, lambda row: f"{row.stack} {row.name.split()[0]}")
        lines += error_rows(rows, lambda row: "all")
    return "\n".join(lines) + "\n"


def main(measurements: Path) -> None:
    """Fit, and write calibration.md beside the measurements."""
    measured = read(measurements)
    costs, behaviours = calibrate(*measured)
    write_report(
        measurements / "calibration.md", report(*predicted(*measured, costs, behaviours), costs, behaviours)
    )
