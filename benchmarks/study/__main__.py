"""`python -m benchmarks.study run TASK ...`, `bits`, `batch`, `report`, `paper STUDIES.yaml`; README.md says more."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch


def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["paper"]:
        from benchmarks.study.paper import __main__ as paper

        paper.main(arguments[1:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that are missing")
    run.add_argument("tasks", nargs="+", metavar="TASK")
    run.add_argument(
        "--data", type=Path, metavar="DIR", default=Path("../shared/data"), help="holds text/, mnist/"
    )
    run.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        help="not the others; in this order, not the most wanted first",
    )
    run.add_argument("--seeds", type=int, default=10, help="of every winner; default %(default)s")
    run.add_argument(
        "--minutes", type=float, help="per task: start no run after so many; call again to go on"
    )
    bits = commands.add_parser(
        "bits", help="winners again, with 16 and 8 bits of state, and others' 8-bit AdamW"
    )
    bits.add_argument("--data", type=Path, metavar="DIR", default=Path("../shared/data"))
    bits.add_argument("--optimizers", nargs="+", metavar="NAME", help="not the others")
    batch = commands.add_parser("batch", help="the best μ at four batch sizes, against the theory's")
    report = commands.add_parser("report", help="tables and pictures")
    report.add_argument(
        "--docs", type=Path, metavar="FILE", help="Markdown file whose generated parts are renewed"
    )
    commands.add_parser("paper", help="the paper's protocols; `paper --help` for more")
    for command in (run, bits, batch, report):
        command.add_argument(
            "--results", type=Path, metavar="DIR", default=Path("runs/study"), help="default %(default)s"
        )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if given.command == "run":
            _run(given)
        elif given.command == "bits":
            _bits(given)
        elif given.command == "batch":
            from benchmarks.study.batch import carry_out

            carry_out(given.results)
        else:
            from benchmarks.study.report import write

            write(given.results, given.docs)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


def _run(given: argparse.Namespace) -> None:
    from benchmarks.study.optimizers import OPTIMIZERS
    from benchmarks.study.plan import carry_out
    from benchmarks.study.tasks import TASKS

    _refuse_unknown("task", given.tasks, list(TASKS))
    _refuse_unknown("optimizer", given.optimizers or [], list(OPTIMIZERS))
    for name in given.tasks:
        TASKS[name].make(0, given.data)  # refuses missing data before the first run of any
    for name in given.tasks:
        done = carry_out(TASKS[name], given.results, given.data, given.optimizers, given.seeds, given.minutes)
        print(f"{name}: {done} runs done")


def _bits(given: argparse.Namespace) -> None:
    from benchmarks.study.optimizers import FEW_BITS
    from benchmarks.study.plan import BITS, carry_out
    from benchmarks.study.tasks import TASKS

    _refuse_unknown("optimizer", given.optimizers or [], list(FEW_BITS))
    done = carry_out(TASKS[BITS], given.results, given.data, given.optimizers, few_bits=True)
    print(f"{BITS}: {done} runs done")


def _refuse_unknown(kind: str, names: list[str], known: list[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown {kind}: {', '.join(unknown)}; there are {', '.join(known)}")


if __name__ == "__main__":
    main()
