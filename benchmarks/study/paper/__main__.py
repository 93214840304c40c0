"""`python -m benchmarks.study paper STUDIES.yaml`: does the runs that are missing, then writes tables and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.study.paper.report import write_report
from benchmarks.study.paper.study import carry_out, read_studies


def main(given: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study paper", description=__doc__)
    parser.add_argument("studies", type=Path, help="for example benchmarks/study/paper/configs/cpu.yaml")
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="the four IDX files, .gz or not")
    parser.add_argument(
        "--cifar10", type=Path, metavar="DIR", help="data_batch_1.bin, ... or train/ and test/ with images"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study-paper"), help="curves; default %(default)s"
    )
    parser.add_argument("--results", type=Path, help="tables and pictures; default: in --output")
    parser.add_argument("--docs", type=Path, help="Markdown file whose generated parts are renewed")
    parser.add_argument("--only", nargs="+", metavar="STUDY", help="not the others")
    parser.add_argument("--minutes", type=float, help="start no run after so many; call again to go on")
    parser.add_argument("--processes", type=int, default=1, help="runs at once; default 1")
    arguments = parser.parse_args(given)
    if arguments.processes < 1:
        parser.error(f"--processes must be at least 1, got {arguments.processes}")
    if arguments.device not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {arguments.device}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    try:
        studies = read_studies(arguments.studies)
        unknown = set(arguments.only or []) - {study.name for study in studies}
        if unknown:
            raise ValueError(f"{arguments.studies} has no study {', '.join(sorted(unknown))}")
        chosen = [study for study in studies if not arguments.only or study.name in arguments.only]
        directories = {"mnist": arguments.mnist, "cifar10": arguments.cifar10}
        left = carry_out(
            chosen, arguments.output, device, directories, arguments.minutes, arguments.processes
        )
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    command = f"python -m benchmarks.study paper {arguments.studies}"
    command += "".join(f" --{name} DIR" for name, directory in directories.items() if directory)
    command += "" if device.type == "cpu" else f" --device {device.type}"
    write_report(
        studies, arguments.output, device.type, arguments.results or arguments.output, command, arguments.docs
    )
    print(f"{left} runs are missing" if left else "all runs are there")


if __name__ == "__main__":
    main()
