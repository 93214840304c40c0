"""A training step under Horovod: sharded ARSG against replicated optimizers."""

from __future__ import annotations

import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.emulated import SleepingLayer
from benchmarks.common.machine import PeakMemory, mpirun, state_bytes
from benchmarks.common.workloads import WORKLOADS, Workload, mean_loss
from benchmarks.step.engine import Rounds, StepBenchmark, median, ratio

ASLEEP = Workload(
    "24 layers whose passes sleep 4 ms forward and 8 ms backward, 25.2 M parameters",
    lambda: torch.nn.Sequential(*(SleepingLayer(1024, 0.004, 0.008) for _ in range(24))),
    lambda size, side: torch.randn(size, 1024),
    1024,
)


class Horovod(StepBenchmark):
    """Time, wire traffic and memory of a training step under Horovod: sharded ARSG against replicated optimizers.

    Steps are timed in rows, one after another as in training: what a step leaves under way may go on behind the next
    forward pass. The workload "asleep" has passes that sleep, and so leave the cores to the exchange, as an accelerator
    does.

    python -m benchmarks.step horovod --ranks 2 4
    python -m benchmarks.step horovod --ranks 3 --transports gloo      # more rows for the same table
    python -m benchmarks.step horovod --device cuda --transports gloo --batch 32 --side 224 --workloads resnet50
    """

    baseline = "ARSG replicated"
    peers = ("ARSG sharded", baseline, "hvd.DistributedOptimizer, torch Adam(amsgrad) fused")
    variant = "transport"
    variants = ("mpi", "gloo")
    job_per_variant = True
    settings = ("rows",)
    headings = (
        "optimizer | whole step ms | × {baseline} | exchange and update alone ms | × {baseline} | waits alone ms "
        "| waits in a step ms | hidden | state MB/rank | sent MB/rank and step | peak MB/rank"
    )
    workloads: Mapping[str, Workload] = {**WORKLOADS, "asleep": ASLEEP}

    def add_options(self, parser: ArgumentParser) -> None:
        """Add rows of steps."""
        parser.add_argument("--rows", type=int, default=3, help="rows of steps timed each time")
        parser.set_defaults(steps=3)

    def table_name(self, arguments: Namespace) -> str:
        """Return the name of the results' files."""
        return "horovod"

    def launcher(self, device: str, ranks: int, variant: str) -> list[str]:
        """Return the command of horovodrun over Gloo, or of mpirun."""
        start = ["horovodrun", "--gloo", "-np", str(ranks)] if variant == "gloo" else mpirun(ranks)
        return [str(Path(sys.executable).with_name(start[0])), *start[1:], sys.executable, "-m"]

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the job, and leave it at the end. Collective."""
        from arsg_dist.engine import discover_ranks
        from arsg_dist.horovod import connect

        communicator = connect(discover_ranks())
        WAITING.watch()
        yield
        communicator.close()

    def measure(self, peer: str, workload: str, variant: str, arguments: Namespace) -> dict[str, Any]:
        """Return median milliseconds of a step and of its parts, and what this rank holds. Collective."""
        import horovod.torch as hvd

        memory = PeakMemory(arguments.device)
        torch.manual_seed(0)
        held = memory.start()
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if arguments.device == "cuda"
            else torch.device("cpu")
        )
        model = self.workloads[workload].model().to(device)
        optimizer = make(peer, model)
        batch = self.workloads[workload].batch(arguments.batch, arguments.side)
        inputs, labels = (tensor.to(device) for tensor in batch)
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
        medians = {name: statistics.median(values) for name, values in found.items()}
        state = state_bytes(getattr(optimizer, "inner", optimizer))
        return {**medians, "state": state, "peak": memory.peak() - held}

    def head(self, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return the report's title, and lines that say what the columns are."""
        return f"Training step under Horovod on {settings['device']}", [
            f"every optimizer made {settings['rounds']} times, {settings['rows']} rows of {settings['steps']} steps "
            "each time; medians; ratios are medians over rounds of ratios within a round",
            "whole step: forward, backward, step and wait for the parameters, in rows of steps; alone: with gradients "
            "at hand; waits: time in which rank 0's program stands still until messages have arrived; hidden: the "
            "share of it that goes away when forward and backward passes run beside the messages",
            "sent: of a ring, computed from the sizes; peak: largest memory beyond what the process held before the "
            "model",
        ]

    def cells(self, peer: str, rounds: Rounds, baseline: Rounds, workload: str, ranks: int) -> list[str]:
        """Return a row of the table from the name of the optimizer on."""
        cells = [peer]
        for key in ("whole", "apart"):
            cells += [f"{median(rounds, key):.0f}", f"{ratio(rounds, baseline, key):.2f}"]
        cells += [f"{median(rounds, f'waited, {key}'):.0f}" for key in ("apart", "whole")]
        sent = wire_bytes(self.workloads[workload], ranks)
        cells += [hidden(rounds), f"{rounds[-1]['state'] / 1e6:.1f}", f"{sent / 1e6:.1f}"]
        return [*cells, f"{median(rounds, 'peak') / 1e6:.0f}"]


class Waiting:
    """Adds up the seconds in which this process stands still until Horovod has done something."""

    seconds = 0.0

    def watch(self) -> None:
        """Replace `synchronize` in every module of Horovod that has it."""
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
    """Return a wrapped optimizer."""
    import horovod.torch as hvd

    import arsg_dist.horovod
    from arsg_dist import ARSG

    parameters = list(model.parameters())
    named = {"named_parameters": list(model.named_parameters())}
    if peer == "ARSG sharded":
        return arsg_dist.horovod.ShardedOptimizer(ARSG(parameters, 1e-6), **named)
    if peer == Horovod.baseline:
        return arsg_dist.horovod.DistributedOptimizer(ARSG(parameters, 1e-6, fused=True), **named)
    return hvd.DistributedOptimizer(torch.optim.Adam(parameters, 1e-6, amsgrad=True, fused=True), **named)


def wait_for_parameters(optimizer: Any) -> None:
    """Gathered parameters are awaited by the next forward pass; the last of a row of steps has to end with them."""
    if hasattr(optimizer, "synchronize_parameters"):
        optimizer.synchronize_parameters()


def hidden(rounds: Rounds) -> str:
    """Return the share of the waiting for messages that goes away when passes run beside them; none if it grows."""
    share = statistics.median(
        1 - each["waited, whole"] / each["waited, apart"] if each["waited, apart"] else 0.0 for each in rounds
    )
    return f"{share:.0%}" if share > 0 else "none"


def wire_bytes(workload: Workload, ranks: int) -> float:
    """Return the bytes a rank sends per step in a ring, for fp32.

    An all-reduce of gradients sends as much as their reduce-scatter and the all-gather of parameters: sharding saves
    memory and work, not traffic.
    """
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in workload.model().parameters())
    return 2 * 4 * size * (ranks - 1) / ranks
