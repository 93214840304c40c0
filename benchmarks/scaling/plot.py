"""Draw docs/images/scaling.png: how well the scaling model describes rehearsal hosts, and what it predicts."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks.scaling import fit
from benchmarks.scaling.inputs import CLUSTERS, load_of
from benchmarks.scaling.model import alone_seconds, step_range
from benchmarks.scaling.traffic import STRATEGIES, memory

OUT = Path(__file__).parents[2] / "docs/images/scaling.png"
RANKS = [2**k for k in range(13)]
COLORS = dict(
    zip(
        STRATEGIES,
        (*("#444444", "#8c564b", "#9467bd", "#1f77b4", "#17becf", "#2ca02c", "#d62728", "#ff7f0e"),),
        strict=True,
    )
)


def errors(axes: Axes, measurements: Path) -> None:
    """Measured against predicted step times."""
    measured = fit.read(measurements)
    _, steps = fit.predicted(*measured, *fit.calibrate(*measured))
    for fitted, label, color in ((True, "fitted to", "#1f77b4"), (False, "not fitted to", "#d62728")):
        rows = [row for row in steps if row.fitted_to is fitted]
        points = [row.measured for row in rows], [row.predicted for row in rows]
        style = {"color": color, "markerfacecolor": "none" if fitted else color, "markersize": 4}
        axes.plot(*points, "o", **style, label=f"{label} ({len(rows)})")
    ends = [0.1, 2.5]
    axes.plot(ends, ends, color="0.4", linewidth=0.8)
    axes.fill_between(ends, [0.8 * x for x in ends], [1.25 * x for x in ends], color="0.9", zorder=0)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="measured, s",
        ylabel="model, s",
        title="Steps on 1 to 4 rehearsal hosts\n100 Mbit/s to 2 Gbit/s; band: factor 1.25",
    )
    axes.legend(frameon=False, loc="upper left")


def efficiency(axes: Axes, name: str, cluster_name: str) -> None:
    """Time of one rank over time of many, each rank with the same work; from nothing hidden to all hidden."""
    load, cluster = load_of(name), CLUSTERS[cluster_name]
    alone = alone_seconds(load, cluster)
    for strategy in STRATEGIES:
        if strategy == "zero2":
            continue  # on zero1's line
        best, worst = zip(
            *([alone / s for s in step_range(strategy, load, cluster, n)] for n in RANKS), strict=True
        )
        label = "zero1, zero2" if strategy == "zero1" else strategy
        axes.fill_between(RANKS, worst, best, color=COLORS[strategy], alpha=0.12)
        axes.plot(RANKS, worst, color=COLORS[strategy], linewidth=1.3, label=label)
        axes.plot(RANKS, best, color=COLORS[strategy], linewidth=0.8, linestyle=":")
    axes.set(
        xscale="log",
        ylim=(0, 1.15),
        xlabel="ranks",
        title=f"PREDICTED efficiency, {name} on {cluster_name}\nlines: nothing hidden; dotted: all that can be",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, loc="lower left", fontsize=8)


def held(axes: Axes, name: str, cluster_name: str) -> None:
    """Parameters, gradients and state per rank."""
    load, cluster = load_of(name), CLUSTERS[cluster_name]
    for strategy in STRATEGIES:
        if strategy == "zero2":
            continue
        axes.plot(
            RANKS,
            [memory(strategy, load, cluster, n) / 1e9 for n in RANKS],
            color=COLORS[strategy],
            linewidth=1.3,
        )
    axes.axhline(cluster.memory / 1e9, color="0.4", linewidth=0.8, linestyle="--")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="ranks",
        ylabel="GB per rank",
        title=f"PREDICTED memory, {name}, bf16\nwithout activations; dashed: one H100",
    )


def main(measurements: Path) -> None:
    """Write the picture."""
    figure, panels = plt.subplots(1, 4, figsize=(17, 4.3), constrained_layout=True)
    errors(panels[0], measurements)
    efficiency(panels[1], "resnet50", "dgx-a100")
    efficiency(panels[2], "llama7b", "hgx-h100")
    held(panels[3], "llama7b", "hgx-h100")
    for axes in panels:
        axes.grid(which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT, dpi=80)
    print(f"wrote {OUT}, {OUT.stat().st_size // 1000} kB")
