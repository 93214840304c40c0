"""Time, wire traffic and memory of a training step under Horovod: sharded ARSG against replicated ones.

Started plainly, this starts one job per transport and number of ranks (mpirun, or horovodrun over Gloo). A job makes
every optimizer in turn, in random order, several rounds of them, so that a load on the machine meets all; ratios are
medians over rounds of ratios within a round. Steps are timed in rows, one after another as in training: what a step
leaves under way may go on behind the next forward pass. Examples:

    python benchmarks/horovod_step.py --ranks 2 4
    python benchmarks/horovod_step.py --ranks 3 --transports gloo      # more rows for the same table
    python benchmarks/horovod_step.py --device cuda --transports gloo --batch 32 --side 224 --workloads resnet50

The workload "asleep" has passes that sleep, and so leave the cores to the exchange, as an accelerator does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from emulated import SleepingLayer
from kept_results import KeptResults
from machine import PeakMemory, device_name
from torch import Tensor
from workloads import WORKLOADS, Workload, mean_loss

ASLEEP = Workload(
    "24 layers whose passes sleep 4 ms forward and 8 ms backward, 25.2 M parameters",
    lambda: torch.nn.Sequential(*(SleepingLayer(1024, 0.004, 0.008) for _ in range(24))),
    lambda size, side: torch.randn(size, 1024),
    1024,
)
ALL = {**WORKLOADS, "asleep": ASLEEP}
BASELINE = "ARSG replicated"
SETTINGS = ("device", "batch", "side", "rounds", "rows", "steps")
"""What all measurements of a table have in common."""
PEERS = ["ARSG sharded", BASELINE, "hvd.DistributedOptimizer, torch Adam(amsgrad) fused"]


def parsed() -> argparse.Namespace:
    """The command line; the job under the launcher gets the driver's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workloads", nargs="+", choices=list(ALL), default=list(ALL))
    parser.add_argument("--transports", nargs="+", choices=["mpi", "gloo"], default=["mpi", "gloo"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--batch", type=int, default=2, help="samples per rank")
    parser.add_argument("--side", type=int, default=32, help="image side, or tokens per sample")
    parser.add_argument("--rounds", type=int, default=3, help="how often every optimizer is made")
    parser.add_argument("--rows", type=int, default=3, help="rows of steps timed each time")
    parser.add_argument("--steps", type=int, default=3, help="steps in a row")
    parser.add_argument(
        "--output", type=Path, help="Markdown file (default: benchmarks/results/...), with .json"
    )
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# The job on every rank -----------------------------------------------------------------------------------------------


class Waiting:
    """Adds up the time in which this process stands still until Horovod has done something.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self) -> None:
        """Replaces `synchronize` in every module of Horovod that has it."""
        import horovod.torch as hvd
        from horovod.torch import mpi_ops, optimizer

        plain = mpi_ops.synchronize

        def timed(handle: int) -> Any:
            begin = time.perf_counter()
            result = plain(handle)
            self.seconds += time.perf_counter() - begin
            return result

        for module in (hvd, mpi_ops, optimizer):
            module.synchronize = timed


WAITING = Waiting()


def make(peer: str, model: torch.nn.Module) -> Any:
    """A wrapped optimizer."""
    import horovod.torch as hvd

    import arsg_dist.horovod
    from arsg_dist import ARSG

    parameters = list(model.parameters())
    named = {"named_parameters": list(model.named_parameters())}
    if peer == "ARSG sharded":
        return arsg_dist.horovod.ShardedOptimizer(ARSG(parameters, 1e-6), **named)
    if peer == BASELINE:
        return arsg_dist.horovod.DistributedOptimizer(ARSG(parameters, 1e-6, fused=True), **named)
    return hvd.DistributedOptimizer(torch.optim.Adam(parameters, 1e-6, amsgrad=True, fused=True), **named)


def wait_for_parameters(optimizer: Any) -> None:
    """Gathered parameters are awaited by the next forward pass; the last of a row of steps has to end with them."""
    if hasattr(optimizer, "synchronize_parameters"):
        optimizer.synchronize_parameters()


def measure(peer: str, workload: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of a step and of its parts, and what this rank holds."""
    import horovod.torch as hvd

    memory = PeakMemory(arguments.device)
    torch.manual_seed(0)
    held = memory.start()
    device = torch.device(arguments.device, hvd.local_rank() if arguments.device == "cuda" else None)
    model = ALL[workload].model().to(device)
    optimizer = make(peer, model)
    inputs, labels = (t.to(device) for t in ALL[workload].batch(arguments.batch, arguments.side))
    gradients: list[Tensor] = []

    def passes() -> None:
        """Forward and backward passes without any exchange."""
        gradients[:] = torch.autograd.grad(mean_loss(model(inputs), labels), list(model.parameters()))

    def step() -> None:
        """In which the exchange may hide behind the passes."""
        mean_loss(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def exchange_and_update() -> None:
        """With the gradients at hand, so that nothing can hide."""
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        wait_for_parameters(optimizer)

    def now() -> float:
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    def row_of(kind: Callable[[], None]) -> float:
        hvd.barrier()
        begin = now()
        for _ in range(arguments.steps):
            kind()
        wait_for_parameters(optimizer)
        return (now() - begin) / arguments.steps

    kinds = {"compute": passes, "whole": step, "apart": exchange_and_update}
    found: dict[str, list[float]] = {}
    for number in range(1 + arguments.rows):
        for name, kind in kinds.items():
            WAITING.seconds = 0.0
            duration = row_of(kind)
            if number:  # the first row warms up
                found.setdefault(name, []).append(duration)
                found.setdefault(f"waited, {name}", []).append(1e3 * WAITING.seconds / arguments.steps)
        optimizer.zero_grad()
    state = sum(
        value.numel() * value.element_size()
        for state in getattr(optimizer, "inner", optimizer).state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {**medians, "state": state, "peak": memory.peak() - held}


def job(arguments: argparse.Namespace) -> None:
    """All measurements on this number of ranks; rank 0 writes them."""
    import horovod.torch as hvd

    from arsg_dist.engine import discover_ranks, end_process
    from arsg_dist.horovod import connect

    communicator = connect(discover_ranks())
    WAITING.watch()
    if arguments.device == "cuda":
        torch.cuda.set_device(hvd.local_rank())
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // hvd.size()))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    order = random.Random(0)  # the same on every rank
    for workload in arguments.workloads:
        for _ in range(arguments.rounds):
            for peer in order.sample(PEERS, len(PEERS)):
                result = measure(peer, workload, arguments)
                results.setdefault(workload, {}).setdefault(peer, []).append(result)
                if hvd.rank() == 0:
                    print(workload, peer, json.dumps(result), flush=True)
                    arguments.job.write_text(json.dumps(results))
    communicator.close()
    end_process(0)


# The driver ----------------------------------------------------------------------------------------------------------


def launcher(transport: str, ranks: int) -> list[str]:
    """Command that starts the job's ranks on this machine."""
    programs = Path(sys.executable).parent
    if transport == "gloo":
        return [str(programs / "horovodrun"), "--gloo", "-np", str(ranks), sys.executable]
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [
        str(programs / "mpirun"), *root, "-np", str(ranks), "--bind-to", "none", "--oversubscribe", sys.executable
    ]  # fmt: skip


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    """Median over rounds."""
    return statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))


def hidden(rounds: list[dict[str, Any]]) -> str:
    """Share of the waiting for messages that goes away when passes run beside them; none if it grows."""
    share = statistics.median(
        1 - each["waited, whole"] / each["waited, apart"] if each["waited, apart"] else 0.0 for each in rounds
    )
    return f"{share:.0%}" if share > 0 else "none"


def wire_bytes(workload: str, ranks: int) -> float:
    """Bytes a rank sends per step in a ring, for fp32.

    An all-reduce of gradients sends as much as their reduce-scatter and the all-gather of parameters: sharding saves
    memory and work, not traffic.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in ALL[workload].model().parameters())
    return 2 * 4 * size * (ranks - 1) / ranks


def table(workload: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of Markdown for one model."""
    lines = [
        "| transport | ranks | optimizer | whole step ms | × ARSG replicated | exchange and update alone ms "
        "| × ARSG replicated | waits alone ms | waits in a step ms | hidden | state MB/rank | sent MB/rank and step "
        "| peak MB/rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, all_peers in sorted(results.items(), key=lambda row: row[0].split("/")[1:]):
        of_workload, transport, ranks = name.split("/")
        if of_workload != workload:
            continue
        baseline = all_peers[BASELINE]
        for peer in PEERS:
            rounds = all_peers[peer]
            lines.append(
                f"| {transport} | {ranks} | {peer} | {statistics.median(r['whole'] for r in rounds):.0f} "
                f"| {ratio(rounds, baseline, 'whole'):.2f} | {statistics.median(r['apart'] for r in rounds):.0f} "
                f"| {ratio(rounds, baseline, 'apart'):.2f} "
                f"| {statistics.median(r['waited, apart'] for r in rounds):.0f} "
                f"| {statistics.median(r['waited, whole'] for r in rounds):.0f} | {hidden(rounds)} "
                f"| {rounds[-1]['state'] / 1e6:.1f} | {wire_bytes(workload, int(ranks)) / 1e6:.1f} "
                f"| {statistics.median(r['peak'] for r in rounds) / 1e6:.0f} |"
            )
    return lines


def report_of(kept: KeptResults) -> list[str]:
    """Lines of Markdown."""
    settings = kept.settings
    lines = [
        f"# Training step under Horovod on {settings['device']}",
        "",
        f"- device: {settings['machine']}",
        f"- torch {settings['torch']}; {settings['batch']} samples of side/length {settings['side']} per rank",
        f"- every optimizer made {settings['rounds']} times, {settings['rows']} rows of {settings['steps']} steps each "
        "time; medians; ratios are medians over rounds of ratios within a round",
        "- whole step: forward, backward, step and wait for the parameters, in rows of steps; alone: with gradients at "
        "hand; waits: time in which rank 0's program stands still until messages have arrived; hidden: the share of "
        "it that goes away when forward and backward passes run beside the messages",
        "- sent: of a ring, computed from the sizes; peak: largest memory beyond what the process held before the "
        "model",
        *(f"- command: `{command}`" for command in kept.commands),
        "",
    ]
    for workload, description in ALL.items():
        rows = table(workload, kept.results)
        if len(rows) > 2:
            lines += [f"## {description.title}", "", *rows, ""]
    return lines


def driver(arguments: argparse.Namespace) -> None:
    """Starts the jobs, adds what they measured to earlier results and writes the report."""
    output = arguments.output or Path(__file__).parent / "results" / f"horovod_step_{arguments.device}.md"
    settings = {key: getattr(arguments, key) for key in SETTINGS}
    kept = KeptResults(
        output, settings | {"torch": torch.__version__, "machine": device_name(arguments.device)}
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for transport in arguments.transports:
        for ranks in arguments.ranks:
            with tempfile.TemporaryDirectory() as directory:
                measured = Path(directory) / "results.json"
                command = [*launcher(transport, ranks), __file__, *sys.argv[1:], "--job", str(measured)]
                subprocess.run(command, check=True, env=environment)
                new = json.loads(measured.read_text())
            kept.add({f"{workload}/{transport}/{ranks}": peers for workload, peers in new.items()})
    kept.write_table(report_of(kept))


if __name__ == "__main__":
    arguments = parsed()
    if arguments.job:
        job(arguments)
    else:
        driver(arguments)
