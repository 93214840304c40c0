"""Draw the gain factor picture of docs/theory.md: r(τ) for several observation factors μ.

    python -m benchmarks.plot_gain_factor [--beta B] [--mu MU ...] [--out PNG]

Above r(τ) itself, below 1 − r on a logarithmic axis: the share of the error that a step removes.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from arsg_dist import theory

DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "images" / "gain_factor.png"


def taus(beta: float, mu: float) -> torch.Tensor:
    """Return τ up to past the convergence bound, finer where r(τ) has a corner or crosses 1."""
    minus, plus = theory.critical_points(beta, mu)
    bound = theory.convergence_bound(beta, mu)
    towards = torch.logspace(-9, -0.3, 2_000, dtype=torch.float64)
    parts = [torch.logspace(math.log10(minus / 10), math.log10(2 * bound), 4_000, dtype=torch.float64)]
    parts += [point * (1 - towards) for point in (minus, plus, bound)]
    parts += [point * (1 + towards) for point in (minus, plus, bound)]
    return torch.cat(parts).sort().values


def draw(axes: Axes, beta: float, mu: float, color: str, *, removed: bool) -> None:
    """Draw r(τ), or with `removed` 1 − r(τ), with both critical points and the convergence bound marked."""

    def shown(gain: torch.Tensor) -> torch.Tensor:
        return 1 - gain if removed else gain

    tau = taus(beta, mu)
    label = f"$\\mu$ = {mu:g}" + (r" = 1 $-$ $\beta$ (Nesterov)" if math.isclose(mu, 1 - beta) else "")
    axes.plot(tau, shown(theory.gain_factor(tau, beta, mu)), color=color, linewidth=1.7, label=label)
    axes.axvline(theory.convergence_bound(beta, mu), color=color, linewidth=1.0, linestyle=":")
    for point, marker in zip(theory.critical_points(beta, mu), ("v", "o"), strict=True):
        gain = torch.tensor(theory.gain_factor(point, beta, mu))
        axes.plot(point, shown(gain), marker, color=color, markersize=6.5, zorder=3, clip_on=False)


def main() -> None:
    """Read the options and write the picture."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--beta", type=float, default=0.999, help="decay rate of the first moment")
    parser.add_argument(
        "--mu", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1, 0.2], help="observation factors"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="PNG to write")
    options = parser.parse_args()

    figure, (above, below) = plt.subplots(2, 1, figsize=(8.0, 7.2), sharex=True, constrained_layout=True)
    colors = mpl.colormaps["viridis"](torch.linspace(0.0, 0.88, len(options.mu)).tolist())
    for mu, color in zip(options.mu, colors, strict=True):
        draw(above, options.beta, mu, color, removed=False)
        draw(below, options.beta, mu, color, removed=True)

    slowest = 1 - math.sqrt(options.beta)
    fastest = 1 - min(
        theory.gain_factor(theory.optimal_tau(options.beta, mu), options.beta, mu) for mu in options.mu
    )
    above.axhline(1.0, color="0.4", linewidth=0.8)
    above.set(
        xscale="log",
        ylim=(1 - 1.08 * fastest, 1 + 0.15 * fastest),
        ylabel=r"gain factor r($\tau$)",
        title=rf"Error left by one step of RSG on a quadratic, $\beta$ = {options.beta:g}",
    )
    below.set(
        yscale="log",
        ylim=(slowest / 30, 2 * fastest),
        xlabel=r"$\tau$ = learning rate $\times$ curvature",
        ylabel=r"1 $-$ r($\tau$)",
    )
    above.legend(loc="lower left", title="observation factor", frameon=False)
    marks = [
        Line2D(
            [], [], color="0.3", marker="v", linestyle="", label=r"$\tau_{cb-}$: eigenvalues turn complex"
        ),
        Line2D([], [], color="0.3", marker="o", linestyle="", label=r"$\tau_{cb+}$: fastest"),
        Line2D([], [], color="0.3", linestyle=":", label="convergence bound, r = 1"),
    ]
    below.legend(handles=marks, loc="upper left", frameon=False)
    for axes in (above, below):
        axes.grid(which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
