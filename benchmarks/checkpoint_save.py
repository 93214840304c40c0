"""How long training stands still for a checkpoint: written before it goes on, and while it goes on, against torch.save.

Started plainly, this starts one job per number of ranks (one: a single process; more: Horovod's sharded engine under
mpirun). torch.save writes the whole model and optimizer on rank 0 and syncs the file, as the others do; under several
ranks the state is first gathered there, which is part of the time. Example:

    python -m benchmarks.checkpoint_save --ranks 1 2 --workloads resnet50 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import Engine, SingleProcessEngine, discover_ranks, end_process
from benchmarks.common.kept_results import machine_results, this_command, write_report
from benchmarks.common.machine import device_name, mpirun
from benchmarks.common.workloads import WORKLOADS

BASELINE = "torch.save on rank 0"


def parsed() -> argparse.Namespace:
    """The command line; the job under the launcher gets the driver's."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="how often each way saves")
    parser.add_argument("--directory", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--output", type=Path, default=machine_results("cpu") / "checkpoint_save.md")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_engine(workload: str) -> Engine:
    """An engine that has made one update, without a forward pass through the model."""
    ranks = discover_ranks()
    torch.manual_seed(0)
    model = WORKLOADS[workload].model()
    optimizer = ARSG(model.parameters(), lr=1e-3)
    engine: Engine
    if ranks.world_size == 1:
        engine = SingleProcessEngine(model, optimizer)
    else:
        from arsg_dist import horovod

        engine = horovod.HorovodShardedEngine(model, optimizer, horovod.connect(ranks))
    engine.backward(sum(1e-3 * parameter.square().sum() for parameter in model.parameters()))  # type: ignore[arg-type]
    engine.step()
    return engine


def ways(engine: Engine, directory: Path) -> dict[str, Callable[[], tuple[float, float]]]:
    """Name → saves once; seconds that training stands still, and seconds until the checkpoint is there."""
    communicator = engine.communicator
    store = CheckpointStore(directory, communicator, keep=1)

    def ours(wait: bool) -> tuple[float, float]:
        communicator.barrier()
        begin = time.perf_counter()
        save_run(store, 1, engine.state(), {}, communicator, wait=wait)
        stall = time.perf_counter() - begin
        store.finish()
        return stall, time.perf_counter() - begin

    def plain() -> tuple[float, float]:
        communicator.barrier()
        begin = time.perf_counter()
        state = {"model": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}
        if communicator.rank == 0:
            with (directory / "plain.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        communicator.barrier()
        seconds = time.perf_counter() - begin
        return seconds, seconds

    def load() -> tuple[float, float]:
        communicator.barrier()
        begin = time.perf_counter()
        engine.load_state(SavedRun(directory / "step-000000001"))
        return 0.0, time.perf_counter() - begin

    return {
        "written before training goes on": lambda: ours(True),
        "async_save": lambda: ours(False),
        BASELINE: plain,
        "loading it, digests checked": load,
    }


def job(options: argparse.Namespace) -> None:
    """Measures on every rank; rank 0 writes the results."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, discover_ranks().world_size)))
    results: dict[str, Any] = {}
    for workload in options.workloads:
        engine = make_engine(workload)
        directory = options.job / workload
        if engine.communicator.rank == 0:
            directory.mkdir()
        engine.communicator.barrier()
        made = ways(engine, directory)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
        next(iter(made.values()))()  # memory and page cache warm, and something to load
        order = random.Random(0)
        for _ in range(options.rounds):
            for name in order.sample(list(made), len(made)):
                times[name].append(made[name]())
        size = sum(path.stat().st_size for path in (directory / "step-000000001").iterdir())
        results[workload] = {"bytes": size, "times": times}
        engine.communicator.barrier()
    if engine.communicator.rank == 0:
        (options.job / "results.json").write_text(json.dumps(results))
    engine.communicator.close()


def table(results: dict[int, dict[str, Any]], options: argparse.Namespace) -> str:
    """The report."""
    lines = [
        "# Saving a checkpoint",
        "",
        f"- device: {device_name('cpu')}",
        f"- torch {torch.__version__}; each way {options.rounds} times, in random order; medians; files are synced",
        "- stall: training stands still; complete: from the call until the checkpoint is in place",
        f"- command: `{this_command()}`",
    ]
    for workload in options.workloads:
        lines += ["", f"## {WORKLOADS[workload].title}", ""]
        lines.append("| ranks | MB | way | stall ms | × torch.save | complete ms | × torch.save |")
        lines.append("|---|---|---|---|---|---|---|")
        for ranks, measured in results.items():
            times = measured[workload]["times"]
            base = statistics.median(stall for stall, _ in times[BASELINE])
            for name, values in times.items():
                stall = statistics.median(value for value, _ in values)
                complete = statistics.median(value for _, value in values)
                shown = f"{1e3 * stall:.0f} | {stall / base:.2f}" if stall else "– | –"
                lines.append(
                    f"| {ranks} | {measured[workload]['bytes'] / 1e6:.0f} | {name} | {shown} | "
                    f"{1e3 * complete:.0f} | {complete / base:.2f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The driver."""
    options = parsed()
    if options.job:
        job(options)
        end_process(0)
    results = {}
    for ranks in options.ranks:
        directory = Path(tempfile.mkdtemp(dir=options.directory))
        start = [*(mpirun(ranks) if ranks > 1 else []), sys.executable, "-m", "benchmarks.checkpoint_save"]
        try:
            subprocess.run([*start, *sys.argv[1:], "--job", str(directory)], check=True)
            results[ranks] = json.loads((directory / "results.json").read_text())
        finally:
            shutil.rmtree(directory)
    write_report(options.output, table(results, options))


if __name__ == "__main__":
    main()
