"""A model of step time and memory per rank from 1 to 4,096 ranks. What it says is a prediction, not a measurement.

python -m benchmarks.scaling predict --model resnet50 --cluster dgx-a100 --ranks 8 64
python -m benchmarks.scaling measure --stacks torch horovod     # as root, see tests/cluster
python -m benchmarks.scaling fit
python -m benchmarks.scaling plot
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.kept_results import RESULTS, machine_results
from benchmarks.scaling.inputs import CLUSTERS, load_of
from benchmarks.scaling.measure import PLACES
from benchmarks.scaling.measure import main as measure
from benchmarks.scaling.model import alone_seconds, step_range
from benchmarks.scaling.traffic import STRATEGIES, memory

MEASUREMENTS = RESULTS / "amd-epyc/scaling"
"""What docs/scaling.md was made from."""


def predict(arguments: argparse.Namespace) -> None:
    """Print a table."""
    cluster, load = CLUSTERS[arguments.cluster], load_of(arguments.model)
    print(
        f"Predicted, not measured. {arguments.cluster}: {cluster.source}. {arguments.model}: {load.source}.\n"
    )
    print("| strategy | ranks | step ms, all hidden – nothing hidden | efficiency | GB/rank |")
    print("|---|---|---|---|---|")
    alone = alone_seconds(load, cluster)
    for strategy in STRATEGIES:
        for ranks in arguments.ranks:
            best, worst = step_range(strategy, load, cluster, ranks)
            held = memory(strategy, load, cluster, ranks)
            note = "" if held <= cluster.memory else " (does not fit)"
            print(
                f"| {strategy} | {ranks} | {1e3 * best:.0f} – {1e3 * worst:.0f} "
                f"| {alone / best:.0%} – {alone / worst:.0%} | {held / 1e9:.1f}{note} |"
            )


def main() -> None:
    """Read the command line."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaling", description=__doc__, formatter_class=shape
    )
    commands = parser.add_subparsers(dest="command", required=True)
    predicting = commands.add_parser("predict", help="a table of step times, efficiency and memory")
    predicting.add_argument("--cluster", choices=list(CLUSTERS), default="hgx-h100")
    predicting.add_argument("--model", choices=["llama7b", "resnet50"], default="llama7b")
    predicting.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    measuring = commands.add_parser("measure", help="measure on rehearsal hosts")
    measuring.add_argument("--stacks", nargs="+", choices=list(PLACES), default=list(PLACES))
    measuring.add_argument("--hosts", nargs="+", type=int, default=[1, 2, 3, 4])
    measuring.add_argument("--output", type=Path, help="directory (default: benchmarks/results/...)")
    for name, does in (
        ("fit", "calibrate, and write the errors beside"),
        ("plot", "draw docs/images/scaling.png from"),
    ):
        command = commands.add_parser(name, help=f"{does} what was measured")
        command.add_argument(
            "--measurements", type=Path, default=MEASUREMENTS, help="directory (default: %(default)s)"
        )
    arguments = parser.parse_args()
    if arguments.command == "predict":
        predict(arguments)
    elif arguments.command == "measure":
        measure(arguments.stacks, arguments.hosts, arguments.output or machine_results("cpu") / "scaling")
    elif arguments.command == "fit":
        from benchmarks.scaling.fit import main as fit

        fit(arguments.measurements)
    else:
        from benchmarks.scaling.plot import main as plot

        plot(arguments.measurements)


if __name__ == "__main__":
    main()
