"""Time, communication and memory of a training step in a job of several ranks: ARSG against other optimizers.

    python -m benchmarks.step deepspeed --ranks 1 2
    python -m benchmarks.step horovod --ranks 2 4
    python -m benchmarks.step torch --ranks 2 4

One job after another is started. It makes every optimizer in turn, in random order, several rounds of them, so that a
load on the machine meets all; ratios are medians over rounds of ratios within a round. Calling it again with other
ranks, workloads, stages or transports adds rows to the same table.
"""

from __future__ import annotations

import argparse
import inspect

from benchmarks.step.deepspeed import DeepSpeed
from benchmarks.step.driver import add_options, measure_jobs, run_job
from benchmarks.step.engine import StepBenchmark
from benchmarks.step.horovod import Horovod
from benchmarks.step.on_torch import OnTorch

ENGINES: dict[str, type[StepBenchmark]] = {"deepspeed": DeepSpeed, "horovod": Horovod, "torch": OnTorch}
"""By the name on the command line."""


def main() -> None:
    """Read the command line; a job gets the driver's."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__, formatter_class=shape)
    commands = parser.add_subparsers(dest="engine", required=True)
    for name, kind in ENGINES.items():
        add_options(
            commands.add_parser(name, description=inspect.getdoc(kind), formatter_class=shape), kind()
        )
    arguments = parser.parse_args()
    engine = ENGINES[arguments.engine]()
    if engine.baseline not in arguments.peers:
        parser.error(f"--peers must name {engine.baseline}, with which the others are compared")
    if arguments.job:
        run_job(engine, arguments)
    else:
        measure_jobs(engine, arguments)


if __name__ == "__main__":
    main()
