"""Time, wire traffic and memory of a training step under Horovod: sharded ARSG against replicated ones.

Started plainly, this starts one job per transport and number of ranks (mpirun, or horovodrun over Gloo). A job makes
every optimizer in turn, in random order, several rounds of them, so that a load on the machine meets all; ratios are
medians over rounds of ratios within a round. Examples:

    python benchmarks/horovod_step.py --ranks 2 4
    python benchmarks/horovod_step.py --device cuda --transports gloo --batch 32 --side 224 --workloads resnet50
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import PeakMemory, device_name
from workloads import WORKLOADS, mean_loss

BASELINE = "ARSG replicated"
PEERS = ["ARSG sharded", BASELINE, "hvd.DistributedOptimizer, torch Adam(amsgrad) fused"]


def parsed() -> argparse.Namespace:
    """The command line; the job under the launcher gets the driver's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--transports", nargs="+", choices=["mpi", "gloo"], default=["mpi", "gloo"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--batch", type=int, default=2, help="samples per rank")
    parser.add_argument("--side", type=int, default=32, help="image side, or tokens per sample")
    parser.add_argument("--rounds", type=int, default=3, help="how often every optimizer is made")
    parser.add_argument("--steps", type=int, default=5, help="timed steps each time")
    parser.add_argument("--output", type=Path, help="Markdown file (default: benchmarks/results/...)")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# The job on every rank -----------------------------------------------------------------------------------------------


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
    """Gathered parameters are awaited by the next forward pass; a timed step has to end with them."""
    if hasattr(optimizer, "synchronize_parameters"):
        optimizer.synchronize_parameters()


def measure(peer: str, workload: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of the parts of a step, and what this rank holds."""
    import horovod.torch as hvd

    memory = PeakMemory(arguments.device)
    torch.manual_seed(0)
    held = memory.start()
    device = torch.device(arguments.device, hvd.local_rank() if arguments.device == "cuda" else None)
    model = WORKLOADS[workload].model().to(device)
    optimizer = make(peer, model)
    inputs, labels = (t.to(device) for t in WORKLOADS[workload].batch(arguments.batch, arguments.side))

    def now() -> float:
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    compute, whole, apart = [], [], []
    for step in range(2 + arguments.steps):
        # Forward and backward passes of the same model without any exchange.
        loss = mean_loss(model(inputs), labels)
        hvd.barrier()
        begin = now()
        grads = torch.autograd.grad(mean_loss(model(inputs), labels), list(model.parameters()))
        computed = now() - begin
        # A whole step, in which the exchange may hide behind the backward pass.
        del loss
        optimizer.zero_grad()
        hvd.barrier()
        begin = now()
        mean_loss(model(inputs), labels).backward()
        optimizer.step()
        wait_for_parameters(optimizer)
        stepped = now() - begin
        # The same exchange and update with the gradients at hand, so that nothing can hide.
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad
        hvd.barrier()
        begin = now()
        optimizer.step()
        wait_for_parameters(optimizer)
        if step > 1:
            apart.append(now() - begin)
            compute.append(computed)
            whole.append(stepped)
    state = sum(
        value.numel() * value.element_size()
        for state in getattr(optimizer, "_inner", optimizer).state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    medians = {
        "compute": statistics.median(compute),
        "whole": statistics.median(whole),
        "apart": statistics.median(apart),
    }
    result = {**medians, "state": state, "peak": memory.peak() - held}
    del optimizer, model, grads
    gc.collect()
    return result


def job(arguments: argparse.Namespace) -> None:
    """All measurements on this number of ranks; rank 0 writes them."""
    import horovod.torch as hvd

    from arsg_dist.engine import discover_ranks, end_process
    from arsg_dist.horovod import connect

    communicator = connect(discover_ranks())
    if arguments.device == "cuda":
        torch.cuda.set_device(hvd.local_rank())
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // hvd.size()))
    results: dict[str, list[dict[str, Any]]] = {}
    order = random.Random(0)  # the same on every rank
    for workload in arguments.workloads:
        for _ in range(arguments.rounds):
            for peer in order.sample(PEERS, len(PEERS)):
                result = measure(peer, workload, arguments)
                results.setdefault(f"{workload}/{peer}", []).append(result)
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


def exposed(result: dict[str, Any]) -> float:
    """Milliseconds that exchange and update add to the forward and backward passes of a whole step."""
    return result["whole"] - result["compute"]


def overlapped(rounds: list[dict[str, Any]]) -> str:
    """Share of exchange and update that does not show in the whole step; none if they add more than they take alone.

    They do where the exchange takes cores from the passes: then a percentage of what is hidden has no meaning.
    """
    share = statistics.median(1 - exposed(result) / result["apart"] for result in rounds)
    return f"{share:.0%}" if share > 0 else "none"


def wire_bytes(workload: str, ranks: int) -> float:
    """Bytes a rank sends per step in a ring, for fp32.

    An all-reduce of gradients sends as much as their reduce-scatter and the all-gather of parameters: sharding saves
    memory and work, not traffic.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in WORKLOADS[workload].model().parameters())
    return 2 * 4 * size * (ranks - 1) / ranks


def table(workload: str, results: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Rows of Markdown for one model."""
    lines = [
        "| transport | ranks | optimizer | whole step ms | × ARSG replicated | exchange and update alone ms "
        "| × ARSG replicated | exposed ms | overlapped share | state MB/rank | sent MB/rank and step | peak MB/rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (transport, ranks), all_peers in results.items():
        baseline = all_peers[f"{workload}/{BASELINE}"]
        for peer in PEERS:
            rounds = all_peers[f"{workload}/{peer}"]
            lines.append(
                f"| {transport} | {ranks} | {peer} | {statistics.median(r['whole'] for r in rounds):.0f} "
                f"| {ratio(rounds, baseline, 'whole'):.2f} | {statistics.median(r['apart'] for r in rounds):.0f} "
                f"| {ratio(rounds, baseline, 'apart'):.2f} | {statistics.median(map(exposed, rounds)):.0f} "
                f"| {overlapped(rounds)} "
                f"| {rounds[-1]['state'] / 1e6:.1f} | {wire_bytes(workload, ranks) / 1e6:.1f} "
                f"| {statistics.median(r['peak'] for r in rounds) / 1e6:.0f} |"
            )
    return lines


def driver(arguments: argparse.Namespace) -> None:
    """Starts the jobs and writes the report."""
    results: dict[tuple[str, int], dict[str, Any]] = {}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for transport in arguments.transports:
        for ranks in arguments.ranks:
            with tempfile.TemporaryDirectory() as directory:
                output = Path(directory) / "results.json"
                command = [*launcher(transport, ranks), __file__, *sys.argv[1:], "--job", str(output)]
                subprocess.run(command, check=True, env=environment)
                results[transport, ranks] = json.loads(output.read_text())
    report = [
        f"# Training step under Horovod on {arguments.device}",
        "",
        f"- device: {device_name(arguments.device)}",
        f"- torch {torch.__version__}; {arguments.batch} samples of side/length {arguments.side} per rank",
        f"- every optimizer made {arguments.rounds} times, {arguments.steps} timed steps each; medians",
        "- whole step: forward, backward, step and wait for the parameters; exposed: whole step - forward and "
        "backward passes of the same model without exchange; overlapped share: 1 - exposed / (exchange and update "
        "alone), 'none' where exchange and update cost more inside a step than alone",
        "- sent: of a ring, computed from the sizes; peak: largest memory beyond what the process held before the "
        "model",
        f"- command: `{shlex.join(['python', 'benchmarks/horovod_step.py', *sys.argv[1:]])}`",
        "",
    ]
    for workload in arguments.workloads:
        report += [f"## {WORKLOADS[workload].title}", "", *table(workload, results), ""]
    output = arguments.output or Path(__file__).parent / "results" / f"horovod_step_{arguments.device}.md"
    output.write_text("\n".join(report))
    print("\n".join(report), f"\nwritten to {output}")


if __name__ == "__main__":
    arguments = parsed()
    if arguments.job:
        job(arguments)
    else:
        driver(arguments)
