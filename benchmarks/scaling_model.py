"""A model of step time and memory per rank from 1 to 4,096 ranks. What it says is a prediction, not a measurement.

    python -m benchmarks.scaling_model predict --model resnet50 --cluster dgx-a100 --ranks 8 64
    python -m benchmarks.scaling_model fit         # on what benchmarks/scaling_measure.py has measured
    python -m benchmarks.scaling_model plot

A step takes forward + backward + update + overhead + what of the communication is not hidden: of the exchanges that can
run behind a pass, `overlap` × (the shorter of the two) is hidden. How long an exchange takes alone:
`scaling_collectives`. What is sent and held: `scaling_traffic`. What the model is asked about: `scaling_inputs`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.scaling_collectives import Cluster, nodes_of, seconds
from benchmarks.scaling_traffic import REUSE_LIMIT, STRATEGIES, Load, exchanges, memory


@dataclass(frozen=True)
class Behaviour:
    """Attributes: overhead: seconds per step; overlap: share of what could be hidden that is, 0 to 1."""

    overhead: float = 0.0
    overlap: float = 0.0


def update_seconds(strategy: str, load: Load, cluster: Cluster, ranks: int) -> float:
    """Of the optimizer alone: 36 bytes per element that the rank updates, at the memory's bandwidth."""
    if not cluster.memory_bandwidth:
        return 0.0
    group = nodes_of(cluster, ranks)[1] if strategy == "horovod-two-level" else ranks
    share = 1 if strategy == "ddp" else group
    return 36 * sum(load.parameters) / share / cluster.memory_bandwidth


def step_seconds(
    strategy: str,
    load: Load,
    cluster: Cluster,
    ranks: int,
    behaviour: Behaviour,
    gathers: int = 1,
) -> float:
    """Time of a training step."""
    total = load.forward + load.backward + behaviour.overhead + update_seconds(strategy, load, cluster, ranks)
    exposed, hideable = communication(strategy, load, cluster, ranks, gathers)
    return total + exposed - behaviour.overlap * hideable


def communication(
    strategy: str, load: Load, cluster: Cluster, ranks: int, gathers: int = 1
) -> tuple[float, float]:
    """Seconds of all exchanges, and of them the most that could be hidden behind the passes."""
    times = {"forward": 0.0, "backward": 0.0, "nothing": 0.0}
    for exchange in exchanges(strategy, load, cluster, ranks, gathers):
        times[exchange.behind] += seconds(cluster, exchange, ranks)
    hideable = min(times["forward"], load.forward) + min(times["backward"], load.backward)
    return sum(times.values()), hideable


def predict(arguments: argparse.Namespace) -> None:
    """Prints a table."""
    from benchmarks.scaling_inputs import CLUSTERS, load_of

    cluster, load = CLUSTERS[arguments.cluster], load_of(arguments.model)
    gathers = 2 if sum(load.parameters) > REUSE_LIMIT else 1
    print(
        f"Predicted, not measured. {arguments.cluster}: {cluster.source}. {arguments.model}: {load.source}.\n"
    )
    print(
        "| strategy | ranks | step ms, all hidden – nothing hidden | efficiency | GB/rank |\n|---|---|---|---|---|"
    )
    for strategy in STRATEGIES:
        for ranks in arguments.ranks:
            best, worst = (
                step_seconds(strategy, load, cluster, ranks, Behaviour(overlap=overlap), gathers)
                for overlap in (1, 0)
            )
            alone = load.forward + load.backward + update_seconds("ddp", load, cluster, 1)
            held = memory(strategy, load, cluster, ranks)
            note = "" if held <= cluster.memory else " (does not fit)"
            print(
                f"| {strategy} | {ranks} | {1e3 * best:.0f} – {1e3 * worst:.0f} "
                f"| {alone / best:.0%} – {alone / worst:.0%} | {held / 1e9:.1f}{note} |"
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    predicting = commands.add_parser("predict", help="a table of step times, efficiency and memory")
    predicting.add_argument("--cluster", choices=["hgx-h100", "dgx-a100"], default="hgx-h100")
    predicting.add_argument("--model", choices=["llama7b", "resnet50"], default="llama7b")
    predicting.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    commands.add_parser(
        "fit", help="calibrate on benchmarks/results/scaling/*.json and write the errors beside them"
    )
    commands.add_parser("plot", help="draw docs/images/scaling.png")
    arguments = parser.parse_args()
    if arguments.command == "predict":
        predict(arguments)
    elif arguments.command == "fit":
        from benchmarks.scaling_fit import main as fit

        fit()
    else:
        from benchmarks.scaling_plot import main as plot

        plot()


if __name__ == "__main__":
    main()
