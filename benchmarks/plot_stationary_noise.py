"""Draw the stationary noise picture of docs/optimizer.md: the variance that noisy gradients keep up, against μ.

    python -m benchmarks.plot_stationary_noise [--beta B] [--tau T ...] [--steps N] [--out PNG]

Above that of x, where the network is evaluated, below that of the base iterate θ, both in units of ασ²/2λ, which x has
in flat directions whatever μ is. Lines are `theory.stationary_variance` and `theory.base_iterate_variance`; dots are
runs of `ARSG(preconditioner="none")` on that quadratic, many coordinates at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import matplotlib.ticker
import torch

from arsg_dist import ARSG, theory

DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "images" / "stationary_noise.png"
COORDINATES = 4_000
SIMULATED = (0.1, 0.3, 0.6)
"""Values of μ that runs are made with."""


def measured(tau: float, beta: float, mu: float, steps: int) -> tuple[float, float]:
    """Run on gradients x + ξ with lr τ; return the mean squares of x and θ at the end, in units of τ/2."""
    torch.manual_seed(0)
    x = torch.nn.Parameter(torch.zeros(COORDINATES, dtype=torch.float64))
    optimizer = ARSG([x], lr=tau, betas=(beta, 0.9), mu=mu, preconditioner="none")
    squares = torch.zeros(2, dtype=torch.float64)
    kept = steps // 4
    for step in range(steps):
        x.grad = x.detach() + torch.randn(COORDINATES, dtype=torch.float64)
        optimizer.step()
        if step >= steps - kept:
            squares[0] += x.detach().square().mean()
            with optimizer.base_iterate():
                squares[1] += x.detach().square().mean()
    of_x, of_theta = (squares / kept / (tau / 2)).tolist()
    return of_x, of_theta


def main() -> None:
    """Read the options and write the picture."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--beta", type=float, default=0.99, help="decay rate of the first moment")
    parser.add_argument(
        "--tau", type=float, nargs="+", default=[1e-4, 0.01, 0.1, 0.5], help="learning rate times curvature"
    )
    parser.add_argument("--steps", type=int, default=2_000, help="of a simulated run; 0 for none")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="PNG to write")
    options = parser.parse_args()

    figure, both = plt.subplots(2, 1, figsize=(8.0, 7.2), sharex=True, constrained_layout=True)
    colors = mpl.colormaps["viridis"](torch.linspace(0.0, 0.88, len(options.tau)).tolist())
    mus = torch.linspace(0.0, 0.999, 800, dtype=torch.float64)
    for tau, color in zip(options.tau, colors, strict=True):
        there = mus[tau < theory.convergence_bound(torch.tensor(options.beta, dtype=torch.float64), mus)]
        arguments = (torch.tensor(tau, dtype=torch.float64), options.beta, there, 1.0, 1.0)
        of_x = theory.stationary_variance(*arguments) / (tau / 2)
        of_theta = theory.base_iterate_variance(*arguments) / (tau / 2)
        for axes, variance in zip(both, (of_x, of_theta), strict=True):
            axes.plot(there, variance, color=color, linewidth=1.7, label=rf"$\tau$ = {tau:g}")
        quietest = theory.quietest_mu(tau, options.beta)
        least = theory.stationary_variance(tau, options.beta, quietest, 1.0, 1.0) / (tau / 2)
        both[0].plot(quietest, least, "v", color=color, markersize=7, zorder=3)
        runs = [mu for mu in SIMULATED if options.steps and tau * options.steps > 10 and mu < there[-1]]
        points = [measured(tau, options.beta, mu, options.steps) for mu in runs]
        for axes, values in zip(both, zip(*points, strict=True), strict=False):
            axes.plot(runs, values, "o", color=color, markersize=5, zorder=3)
    nesterov = 1 - options.beta
    for axes in both:
        axes.axvline(nesterov, color="0.5", linewidth=1.0, linestyle=":")
        axes.set(yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.grid(which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].annotate(
        r"1 $-$ $\beta$: Nesterov's point", (nesterov, 0.97), xycoords=("data", "axes fraction"),
        xytext=(6, 0), textcoords="offset points", va="top", color="0.35", fontsize=9,
    )  # fmt: skip
    both[0].set(
        ylabel=r"variance of x, in $\alpha\sigma^2/2\lambda$",
        title=rf"What gradient noise keeps up on a quadratic, $\beta$ = {options.beta:g}",
    )
    both[1].set(
        xlabel=r"observation factor $\mu$", ylabel=r"variance of $\theta$, in $\alpha\sigma^2/2\lambda$"
    )
    handles, labels = both[1].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
        title=r"$\tau$ = learning rate $\times$ curvature",
    )  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
