"""Start the jobs of an engine, run the rounds inside a job, and write the report."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.kept_results import KeptResults, machine_results, write_report
from benchmarks.common.machine import device_name
from benchmarks.step.engine import StepBenchmark

SETTINGS = ("device", "batch", "side", "rounds", "steps")
"""What all measurements of a table have in common, beside the engine's own settings."""


def add_options(parser: argparse.ArgumentParser, engine: StepBenchmark) -> None:
    """Add the options that all engines have, and the engine's own."""
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--workloads", **several, choices=list(engine.workloads), default=list(engine.workloads)
    )
    parser.add_argument("--peers", **several, choices=engine.peers, default=list(engine.peers))
    parser.add_argument(
        "--ranks", **several, type=int, help="default: 1 to 4, as far as there are GPUs with cuda"
    )
    kind, values = type(engine.variants[0]), list(engine.variants)
    parser.add_argument(
        f"--{engine.variant}s", dest="variants", **several, type=kind, choices=values, default=values
    )
    parser.add_argument("--batch", type=int, default=2, help="samples per rank")
    parser.add_argument("--side", type=int, default=32, help="image side, or tokens per sample")
    parser.add_argument("--rounds", type=int, default=3, help="how often every optimizer is made")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, of one row where there are rows")
    parser.add_argument(
        "--output", type=Path, help="Markdown file (default: benchmarks/results/...), with .json"
    )
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    engine.add_options(parser)


def run_job(engine: StepBenchmark, arguments: argparse.Namespace) -> None:
    """Measure all that this job is for; rank 0 writes it. Collective."""
    from arsg_dist.engine import discover_ranks, end_process

    ranks = discover_ranks()
    if arguments.device == "cuda":
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.world_size))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    order = random.Random(0)  # the same on every rank
    with engine.joined():
        for workload in arguments.workloads:
            for variant in arguments.variants:
                for _ in range(arguments.rounds):
                    for peer in order.sample(arguments.peers, len(arguments.peers)):
                        result = engine.measure(peer, workload, variant, arguments)
                        gc.collect()
                        if arguments.device == "cuda":
                            torch.cuda.empty_cache()
                        results.setdefault(f"{workload}/{variant}", {}).setdefault(peer, []).append(result)
                        if ranks.rank == 0:
                            print(workload, variant, peer, json.dumps(result), flush=True)
                            arguments.job.write_text(json.dumps(results))
    end_process(0)


def measure_jobs(engine: StepBenchmark, arguments: argparse.Namespace) -> None:
    """Start the jobs, add what they measured to earlier results and write the report."""
    arguments.ranks = arguments.ranks or default_ranks(arguments.device)
    output = arguments.output or machine_results(arguments.device) / f"step/{engine.table_name(arguments)}.md"
    settings = {key: getattr(arguments, key) for key in (*SETTINGS, *engine.settings)}
    kept = KeptResults(
        output, settings | {"torch": torch.__version__, "machine": device_name(arguments.device)}
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    jobs = [[variant] for variant in arguments.variants] if engine.job_per_variant else [arguments.variants]
    for variants in jobs:
        for ranks in arguments.ranks:
            with tempfile.TemporaryDirectory() as directory:
                measured = Path(directory) / "results.json"
                command = [*engine.launcher(arguments.device, ranks, variants[0]), __package__, *sys.argv[1:]]
                command += [f"--{engine.variant}s", *map(str, variants), "--job", str(measured)]
                subprocess.run(command, check=True, env=environment)
                new = json.loads(measured.read_text())
            kept.add({f"{row}/{ranks}": peers for row, peers in new.items()})
    write_report(output, report_of(engine, kept))


def default_ranks(device: str) -> list[int]:
    """Return the numbers of ranks to measure where none are asked for: a GPU for each."""
    most = torch.cuda.device_count() if device == "cuda" else 4
    if not most:
        sys.exit("--device cuda: torch sees no CUDA device")
    return list(range(1, min(most, 4) + 1))


def report_of(engine: StepBenchmark, kept: KeptResults) -> str:
    """Return the report in Markdown."""
    settings = kept.settings
    title, explained = engine.head(settings)
    lines = [
        f"# {title}",
        "",
        f"- device: {settings['machine']}",
        f"- torch {settings['torch']}; {settings['batch']} samples of side/length {settings['side']} per rank",
        *(f"- {line}" for line in explained),
        *(f"- command: `{command}`" for command in kept.commands),
        "",
    ]
    headings = f"| {engine.variant} | ranks | {engine.headings.format(baseline=engine.baseline)} |"
    for workload, description in engine.workloads.items():
        if rows := rows_of(engine, workload, kept.results):
            rule = "|---" * (headings.count("|") - 1) + "|"
            lines += [f"## {description.title}", "", headings, rule, *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def rows_of(engine: StepBenchmark, workload: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the rows of one model's table; `results` has them by "WORKLOAD/VARIANT/RANKS" and peer."""
    rows = []
    for name, peers in sorted(results.items(), key=lambda row: row[0].split("/")):
        of_workload, variant, ranks = name.split("/")
        if of_workload == workload:
            for peer in engine.peers:
                if peer in peers:
                    cells = engine.cells(peer, peers[peer], peers[engine.baseline], workload, int(ranks))
                    rows.append(f"| {' | '.join([variant, ranks, *cells])} |")
    return rows
