"""How long training stands still for a checkpoint: written before it goes on, and while it goes on, against torch.save.

Started plainly, this starts one job per number of ranks (one: a single process; more: a sharded engine under mpirun).
torch.save writes the whole model and optimizer on rank 0 and syncs the file, as the others do; under several ranks the
state is first gathered there, which is part of the time. torch.distributed.checkpoint.async_save gets the same pieces
on every rank. Example:

    python -m benchmarks.checkpoint_save --ranks 1 2 --workloads resnet50 --rounds 5 --condition throttled
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import DTensor

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, prepare_save, save_run
from arsg_dist.engine import Engine, SingleProcessEngine, connect_torch, discover_ranks, end_process
from arsg_dist.engine.rendezvous import announce_to_torch
from benchmarks.common.disk import CONDITIONS, condition, disk_of, disk_speed
from benchmarks.common.kept_results import machine_results, this_command, write_report
from benchmarks.common.machine import device_name, mpirun
from benchmarks.common.workloads import WORKLOADS, mean_loss

BASELINE = "torch.save on rank 0"
DCP = "torch.distributed.checkpoint.async_save"
SHARDED = ("horovod-sharded", "fsdp", "deepspeed-2", "deepspeed-3")

Times = tuple[float, float, float]
"""Seconds: training stands still; until the checkpoint is there; what a loop of small operations lost meanwhile."""


def parsed() -> argparse.Namespace:
    """The command line; the job under the launcher gets the driver's."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of the model, with one rank"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--engine", choices=SHARDED, default=SHARDED[0], help="of several ranks")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way saves")
    parser.add_argument("--condition", choices=CONDITIONS, default="idle", help="of disk and machine")
    parser.add_argument("--rate", type=int, default=100, help="MB/s of a disk that is made slow")
    parser.add_argument("--remark", default="", help="what else there is to know, such as other load")
    parser.add_argument("--directory", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--output", type=Path, help="default: results/MACHINE/checkpoint_save_CONDITION.md")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and options.ranks != [1]:
        parser.error("--device cuda needs --ranks 1")
    return options


def make_engine(workload: str, kind: str, device: str) -> Engine:
    """An engine that has made one update, without a pass through the model where the engine can be had without."""
    ranks = discover_ranks()
    torch.manual_seed(0)
    model = WORKLOADS[workload].model().to(device)
    engine: Engine
    if ranks.world_size > 1 and kind == "fsdp":
        from arsg_dist import fsdp

        communicator = connect_torch(ranks)
        fsdp.shard(model)
        engine = fsdp.FSDPEngine(model, ARSG(model.parameters(), lr=1e-3), communicator)
        for parameter in model.parameters():
            parameter.grad = 1e-3 * parameter.detach()
        engine.optimizer.step()
        return engine
    if ranks.world_size > 1 and kind.startswith("deepspeed"):
        from arsg_dist import deepspeed

        communicator = deepspeed.connect(ranks)
        config = {
            "train_batch_size": 2 * ranks.world_size,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(kind[-1]), "reduce_bucket_size": 10_000_000},
            "optimizer": {"type": "ARSG", "params": {"lr": 1e-3}},
        }
        engine = deepspeed.DeepSpeedEngine(model, config, communicator)
        inputs, labels = WORKLOADS[workload].batch(2, 64)
        engine.backward(mean_loss(engine.module(inputs), labels))
        engine.step()
        return engine
    optimizer = ARSG(model.parameters(), lr=1e-3)
    if ranks.world_size == 1:
        engine = SingleProcessEngine(model, optimizer)
    else:
        from arsg_dist import horovod

        engine = horovod.HorovodShardedEngine(model, optimizer, horovod.connect(ranks))
    engine.backward(sum(1e-3 * parameter.square().sum() for parameter in model.parameters()))  # type: ignore[arg-type]
    engine.step()
    return engine


def small_operations(goes_on: Callable[[int], bool]) -> float:
    """Train, in place of a network: operations that are short, so that they wait for the interpreter often.

    Args:
        goes_on: asked for after each; gets how many there were.

    Returns:
        Seconds for each.
    """
    values, count, begin = torch.ones(64, 64), 0, time.perf_counter()
    while goes_on(count):
        for _ in range(20):
            values = (values @ values).clamp_(0, 1)
        count += 1
    return (time.perf_counter() - begin) / max(count, 1)


def whole(state: Any) -> Any:
    """Gather what is sharded. Collective."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if isinstance(state, DTensor) else state


def is_written() -> bool:
    """Whether the thread of a store that writes this rank's part has ended."""
    return all(thread.name != "checkpoint" for thread in threading.enumerate())


def gathered(engine: Engine) -> list[torch.Tensor]:
    """Every rank's pieces of the state in one tensor each, on rank 0. Collective."""
    own = torch.cat([piece.values().flatten().float() for piece in engine.state().pieces])
    size = torch.tensor(own.numel())
    dist.all_reduce(size, dist.ReduceOp.MAX)
    own = torch.nn.functional.pad(own, (0, int(size) - own.numel()))
    leads = engine.communicator.rank == 0
    parts = [torch.empty_like(own) for _ in range(engine.communicator.world_size)] if leads else None
    dist.gather(own, parts)
    return parts or []


def ways(engine: Engine, directory: Path) -> dict[str, Callable[[], Times]]:
    """Name → saves once."""
    communicator = engine.communicator
    store = CheckpointStore(directory, communicator, keep=1)
    prepare_save(store, engine.state())

    def timed(start: Callable[[], Callable[[], bool] | None], finish: Callable[[], object]) -> Times:
        """Call `start`, which returns how to ask whether the checkpoint is there, or None if it is."""
        alone = small_operations(lambda count: count < 50)
        communicator.barrier()
        begin = time.perf_counter()
        done = start()
        stall, lost = time.perf_counter() - begin, 0.0
        if done is not None:
            meanwhile = time.perf_counter()
            each = small_operations(lambda count: not done())
            lost = max(0.0, (time.perf_counter() - meanwhile) * (1 - alone / each)) if each else 0.0
        finish()
        return stall, time.perf_counter() - begin, lost

    def ours(store: CheckpointStore, wait: bool) -> Times:
        def start() -> Callable[[], bool] | None:
            save_run(store, 1, engine.state(), {}, communicator, wait=wait)
            return None if wait else is_written

        return timed(start, store.finish)

    def plain() -> None:
        state: Any
        if engine.kind == "deepspeed":  # whose state_dict() is this rank's part
            state = gathered(engine)
        else:
            state = whole({"model": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()})
        if communicator.rank == 0:
            with (directory / "plain.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        communicator.barrier()

    def theirs(kind: AsyncCheckpointerType) -> Times:
        responses: list[Any] = []

        def start() -> Callable[[], bool]:
            rank = communicator.rank
            pieces = {f"{rank} {p.key} {p.start}": p.values() for p in engine.state().pieces}
            writer = dcp.FileSystemWriter(directory / "dcp", overwrite=True)
            responses.append(dcp.async_save(pieces, storage_writer=writer, async_checkpointer_type=kind))
            staged = getattr(responses[0], "staging_completion", None)
            if staged is not None:
                staged.result()
            return completed().done  # type: ignore[no-any-return]

        def completed() -> Any:
            return getattr(responses[0], "upload_completion", responses[0])

        return timed(start, lambda: (completed().result(), communicator.barrier()))

    def load() -> Times:
        communicator.barrier()
        begin = time.perf_counter()
        engine.load_state(SavedRun(directory / "step-000000001"))
        return 0.0, time.perf_counter() - begin, 0.0

    return {
        "written before training goes on": lambda: ours(store, True),
        "async_save": lambda: ours(store, False),
        "async_save, its memory not prepared": lambda: ours(
            CheckpointStore(directory, communicator, keep=1), False
        ),
        f"{DCP}, thread": lambda: theirs(AsyncCheckpointerType.THREAD),
        f"{DCP}, process": lambda: theirs(AsyncCheckpointerType.PROCESS),
        BASELINE: lambda: timed(plain, lambda: None),  # type: ignore[arg-type, return-value]
        "loading it, digests checked": load,
    }


def job(options: argparse.Namespace) -> None:
    """Measures on every rank; rank 0 writes the results."""
    ranks = discover_ranks()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, ranks.world_size)))
    results: dict[str, Any] = {"disk": disk_of(options.job)}
    for workload in options.workloads:
        engine = make_engine(workload, options.engine, options.device)
        if not dist.is_initialized():
            announce_to_torch(ranks)
            dist.init_process_group("gloo")
        directory = options.job / workload
        if engine.communicator.rank == 0:
            directory.mkdir()
            results["speeds"] = [*results.get("speeds", []), disk_speed(directory)]
        engine.communicator.barrier()
        made = ways(engine, directory)
        times: dict[str, list[Times]] = {name: [] for name in made}
        next(iter(made.values()))()  # page cache warm, and something to load
        made[f"{DCP}, process"]()  # which it starts
        order = random.Random(0)
        for _ in range(options.rounds):
            for name in order.sample(list(made), len(made)):
                times[name].append(made[name]())
        size = sum(path.stat().st_size for path in (directory / "step-000000001").iterdir())
        results[workload] = {"bytes": size, "times": times}
        engine.communicator.barrier()
        if engine.communicator.rank == 0:
            results["speeds"].append(disk_speed(directory))
            shutil.rmtree(directory)
    if engine.communicator.rank == 0:
        Path(os.environ["BENCHMARK_RESULTS"]).write_text(json.dumps(results))
    engine.communicator.close()


def table(results: dict[int, dict[str, Any]], options: argparse.Namespace, said: str) -> str:
    """The report."""
    speeds = sorted(speed for measured in results.values() for speed in measured["speeds"])
    lines = [
        f"# Saving a checkpoint, condition {options.condition}",
        "",
        f"- device: {device_name(options.device)}",
        f"- disk: {next(iter(results.values()))['disk']}; one file written in order and synced, before and after: "
        f"{speeds[0]:.0f} to {speeds[-1]:.0f} MB/s",
        f"- condition: {said}",
        *([f"- {options.remark}"] if options.remark else []),
        f"- torch {torch.__version__}; one rank: a single process; several: {options.engine}; each way "
        f"{options.rounds} times, in random order; medians; files are synced, but for {DCP} not their directory",
        "- stall: training stands still; complete: from the call until the checkpoint is in place; lost: by a loop of "
        "small operations between the two",
        f"- command: `{this_command()}`",
    ]
    for workload in options.workloads:
        lines += ["", f"## {WORKLOADS[workload].title}", ""]
        lines.append("| ranks | MB | way | stall ms | × torch.save | complete ms | × torch.save | lost ms |")
        lines.append("|---|---|---|---|---|---|---|---|")
        for ranks, measured in results.items():
            times = measured[workload]["times"]
            base = statistics.median(stall for stall, _, _ in times[BASELINE])
            for name, values in times.items():
                stall, complete, lost = (
                    statistics.median(value[place] for value in values) for place in (0, 1, 2)
                )
                shown = f"{1e3 * stall:.0f} | {stall / base:.2f}" if stall else "– | –"
                lines.append(
                    f"| {ranks} | {measured[workload]['bytes'] / 1e6:.0f} | {name} | {shown} | "
                    f"{1e3 * complete:.0f} | {complete / base:.2f} | {1e3 * lost:.0f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The driver."""
    options = parsed()
    if options.job:
        job(options)
        end_process(0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes down what a condition has set up
    results, said = {}, ""
    for ranks in options.ranks:
        own = Path(tempfile.mkdtemp(dir=options.directory))
        start = [*(mpirun(ranks) if ranks > 1 else []), sys.executable, "-m", "benchmarks.checkpoint_save"]
        try:
            with condition(options.condition, own, options.rate) as (directory, prefix, said):
                environ = {**os.environ, "BENCHMARK_RESULTS": str(own / "results.json")}
                command = [*prefix, *start, *sys.argv[1:], "--job", str(directory)]
                subprocess.run(command, check=True, env=environ)
            results[ranks] = json.loads((own / "results.json").read_text())
        finally:
            shutil.rmtree(own)
    output = options.output or machine_results(options.device) / f"checkpoint_save_{options.condition}.md"
    write_report(output, table(results, options, said))


if __name__ == "__main__":
    main()
