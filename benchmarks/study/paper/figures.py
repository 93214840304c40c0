"""Pictures of the studies."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.study.paper.curves import Curve, by_label
from benchmarks.study.paper.study import Study


def _median_line(axes: Axes, x: list[float], lines: list[list[float]], **style: object) -> None:
    """The median over seeds, and the range of all of them."""
    (line,) = axes.plot(x, [statistics.median(values) for values in zip(*lines, strict=True)], **style)
    if len(lines) > 1:
        low, high = ([f(values) for values in zip(*lines, strict=True)] for f in (min, max))
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def learning_curves(study: Study, curves: list[Curve]) -> Figure:
    """Training loss over updates, validation accuracy over epochs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = colormaps["tab10"]
    last = []
    for number, (label, runs) in enumerate(by_label(curves).items()):
        fine = [curve for curve in runs if not curve.diverged]
        if not fine:
            continue
        color = "black" if label == "ARSG" else colors(number % 10)
        style = {"label": label, "color": color, "linewidth": 2.2 if "ARSG" in label else 1.2}
        window = fine[0].updates_per_epoch
        smoothed = [curve.smoothed()[:: max(1, window // 10)] for curve in fine]
        x = [window + i * max(1, window // 10) for i in range(len(smoothed[0]))]
        _median_line(left, x, smoothed, **style)
        accuracy = [[100 * record["val_accuracy"] for record in curve.epochs] for curve in fine]
        _median_line(right, [float(i + 1) for i in range(len(accuracy[0]))], accuracy, **style)
        last += [line[len(line) // 4] for line in accuracy]
    left.set(xlabel="updates", ylabel="training loss, mean over an epoch", yscale="log")
    right.set(xlabel="epoch", ylabel="validation accuracy, %")
    if last:
        right.set_ylim(bottom=max(0.0, statistics.median(last) - 12))
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(study.title, fontsize=10)
    return figure


def maps(study: Study, curves: list[Curve]) -> Figure:
    """Training loss over two settings, one map per optimizer, one scale of colours."""
    groups = by_label(curves)
    figure = Figure(figsize=(5.2 * len(groups), 3.6), layout="constrained")
    everything = [curve.train_loss for curve in curves if not curve.diverged]
    best = min(everything)
    for axes, (label, runs) in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True
    ):
        across, down = study.settings["variants"][label].keys() - {"optimizer"}
        across, down = ("lr", across if down == "lr" else down)
        columns, rows = (sorted({c.run.settings[key] for c in runs}) for key in (across, down))
        grid = np.full((len(rows), len(columns)), np.nan)
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                there = [
                    c.train_loss
                    for c in runs
                    if c.run.settings[across] == column and c.run.settings[down] == row and not c.diverged
                ]
                if there:
                    grid[i, j] = statistics.median(there)
                    axes.text(j, i, f"{grid[i, j]:.3f}", ha="center", va="center", fontsize=7, color="white")
        image = axes.imshow(grid, vmin=best, vmax=1.6 * best, cmap="viridis", origin="lower", aspect="auto")
        axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
        axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
        axes.set(xlabel=across, ylabel={"mu": "μ", "beta1": "β1"}.get(down, down), title=label)
    figure.colorbar(image, ax=figure.axes, label="training loss, last epoch", extend="max")
    figure.suptitle(study.title, fontsize=10)
    return figure


def batches(study: Study, curves: list[Curve]) -> Figure:
    """Final training loss over batch size."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = {"none": ":", "sqrt": "--", "linear": "-"}
    for number, (label, runs) in enumerate(by_label(curves).items()):
        for scaling in study.settings["lr_scaling"]:
            points: dict[int, list[float]] = {}
            for curve in runs:
                if not curve.diverged and (curve.run.lr_scaling == scaling or curve.run.batch_size is None):
                    points.setdefault(curve.run.batch, []).append(curve.train_loss)
            sizes = sorted(points)
            color = colormaps["tab10"](number)
            losses = [statistics.median(points[size]) for size in sizes]
            axes.plot(
                sizes,
                losses,
                styles[scaling],
                color=color,
                marker="o",
                label=f"{label}, lr scaled: {scaling}",
            )
    axes.set(xlabel="images per update", ylabel="training loss, last epoch", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.suptitle(study.title, fontsize=10)
    return figure


def engines(study: Study, curves: list[Curve]) -> Figure:
    """The loss of every batch on every engine: one line, if they agree."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        style = {"alpha": 0.35, "linewidth": 5.0} if curve.run.engine == "single" else {"linewidth": 0.8}
        name = f"{curve.label}, {curve.run.engine}, {curve.run.ranks} " + (
            "micro-batches" if curve.run.engine == "single" else "ranks"
        )
        axes.plot(curve.losses, label=name, color=colormaps["tab10"](number % 10), **style)
    axes.set(xlabel="updates", ylabel="loss of the batch", yscale="log")
    axes.legend(fontsize=7)
    figure.suptitle(study.title, fontsize=10)
    return figure


def theta(study: Study, curves: list[Curve]) -> Figure:
    """Validation loss at x and at θ."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, runs in by_label(curves).items():
        for key, where in (("val_loss", "x"), ("val_loss_theta", "θ")):
            lines = [[record[key] for record in curve.epochs] for curve in runs]
            _median_line(
                axes, [float(i + 1) for i in range(len(lines[0]))], lines, label=f"{label} at {where}"
            )
    axes.set(xlabel="epoch", ylabel="validation loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.suptitle(study.title, fontsize=10)
    return figure


FIGURES: dict[str, Callable[[Study, list[Curve]], Figure]] = {
    "table": learning_curves,
    "variants": learning_curves,
    "paired": learning_curves,
    "map": maps,
    "batch": batches,
    "engines": engines,
    "theta": theta,
}
"""Kind of study → its picture."""


def draw(study: Study, curves: list[Curve], path: Path) -> None:
    """Writes the picture of a study as PNG."""
    buffer = BytesIO()
    FIGURES[study.kind](study, curves).savefig(buffer, dpi=100)
    # A palette is enough for a few lines, and a fifth of the size.
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)
