"""The study's two pictures."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.study.ledger import Ledger
from benchmarks.study.optimizers import OPTIMIZERS, TRIALS
from benchmarks.study.tasks import TASKS

if TYPE_CHECKING:
    from benchmarks.study.report import Row

# Okabe and Ito's, which colour-blind readers can tell apart; ours are the warm ones, with markers of their own too.
_OURS, _PEER, _AXIS = "#D55E00", "#0072B2", "0.35"
_LINES = {
    "AdamW": ("black", "-"),
    "RemoteObservation(AdamW)": ("#D55E00", "-"),
    "ARSG adam": ("#E69F00", "-"),
    "ARSG": ("#CC79A7", "--"),
    "NAdamW": ("#0072B2", ":"),
    "Lion": ("#56B4E9", "-."),
    "Muon": ("#009E73", "--"),
    "RemoteObservation(Muon)": ("#D55E00", ":"),
}


def draw_differences(studies: dict[str, list[Row]], path: Path) -> None:
    """Draw, per task, every optimizer's validation loss minus tuned AdamW's with its interval.

    The panels share their lines: optimizers are ordered by the first task's result, those it lacks stand last.
    """
    panels = {
        name: {row.name: row for row in rows if row.difference and row.name != "AdamW"}
        for name, rows in studies.items()
        if TASKS[name].table != "batch"
    }
    panels = {name: rows for name, rows in panels.items() if rows}
    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    size = (2.4 + 3.1 * columns, lines * (1.1 + 0.27 * max(len(names), 4)))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    places = np.ravel(figure.subplots(lines, columns, squeeze=False, sharey=True))
    for unused in places[len(panels) :]:
        unused.set_visible(False)
    for axes, (name, rows) in zip(places[: len(panels)], panels.items(), strict=True):
        _forest(axes, names, rows)
        unit = "log10 of the loss" if TASKS[name].exact else "validation loss"
        axes.set_title(textwrap.fill(TASKS[name].title, 32), fontsize=9)
        axes.set_xlabel(f"{unit} minus AdamW's\n← better", fontsize=9)
    figure.savefig(path)


def _forest(axes: Axes, names: list[str], rows: dict[str, Row]) -> None:
    places = {name: len(names) - 1 - number for number, name in enumerate(names)}
    # What is far off would squeeze the others into one point.
    reach = 4 * float(np.median([abs(row.difference.mean) for row in rows.values()]) or 1.0)
    low = max(-reach, min(0.0, *(row.difference.low for row in rows.values())))
    high = min(reach, max(0.0, *(row.difference.high for row in rows.values())))
    margin = 0.06 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    for name, row in rows.items():
        ours = OPTIMIZERS[name].source == "arsg_dist" and name != "Lion"
        color, marker = (_OURS, "D") if ours else (_PEER, "o")
        interval, place = row.difference, places[name]
        if low <= interval.mean <= high:
            axes.plot([interval.low, interval.high], [place, place], color=color, linewidth=2)
            face = color if interval.differs else "white"
            axes.plot(interval.mean, place, marker, color=color, markerfacecolor=face, markersize=6)
        else:
            above = interval.mean > high
            text = f"{interval.mean:+.2f} →" if above else f"← {interval.mean:+.2f}"
            axes.annotate(
                text,
                (high if above else low, place),
                ha="right" if above else "left",
                va="center",
                fontsize=8,
                color=color,
            )
    axes.axvline(0, color=_AXIS, linewidth=1)
    axes.set_yticks(list(places.values()), list(places), fontsize=9)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def draw_learning(studies: dict[str, list[Row]], ledgers: dict[str, Ledger], path: Path) -> None:
    """Draw the smallest GPT's validation curves, and what so many trials of tuning lead to expect."""
    name = "gpt-0.1M" if "gpt-0.1M" in studies else next(iter(studies))
    task, ledger = TASKS[name], ledgers[name]
    figure = Figure(figsize=(11.5, 4.3), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    last = []
    for row in studies[name]:
        if row.name not in _LINES or row.difference is None:
            continue
        color, style = _LINES[row.name]
        curves = np.array([run["curve"] for run in row.runs], dtype=float)
        x = (1 + np.arange(curves.shape[1])) * task.updates / curves.shape[1]
        left.plot(x, curves.mean(0), style, color=color, label=row.name, linewidth=1.8)
        last.append(curves.mean(0))
        expected = expected_best([trial["val"] for trial in ledger.chosen(kind="trial", optimizer=row.name)])
        if expected:
            right.plot(
                range(1, len(expected) + 1), expected, style, color=color, label=row.name, linewidth=1.8
            )
    ends = [curve[-1] for curve in last]
    left.set_ylim(min(ends) - 0.03, min(ends) + 0.6)
    left.set_xlabel("updates")
    left.set_ylabel("validation loss, mean of the seeds")
    left.set_title(f"{task.title}: each tuned", fontsize=10)
    left.legend(fontsize=8)
    right.set_xlabel("trials of tuning")
    right.set_ylabel("expected best validation loss")
    right.set_xlim(1, TRIALS)
    right.set_ylim(min(ends) - 0.03, min(ends) + 0.3)
    right.set_title("What tuning buys", fontsize=10)
    for axes in (left, right):
        axes.grid(color="0.9")
    figure.savefig(path)


def expected_best(values: list[Any]) -> list[float]:
    """Return the expected lowest of k trials drawn without replacement, for k from 1 on; diverged ones are the worst.

    Args:
        values: of all trials; None for a diverged one, which counts as the highest of the others.
    """
    ended = [value for value in values if value is not None]
    if not ended:
        return []
    ordered = sorted(ended + [max(ended)] * (len(values) - len(ended)))
    count = len(ordered)
    return [
        sum(value * math.comb(count - 1 - place, k - 1) for place, value in enumerate(ordered))
        / math.comb(count, k)
        for k in range(1, count + 1)
    ]
