"""A training step on torch alone: the engines ddp and fsdp against torch's own classes."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common.machine import PeakMemory, state_bytes
from benchmarks.common.workloads import WORKLOADS, Transformer, Workload, mean_loss
from benchmarks.step.engine import Rounds, StepBenchmark, median, ratio

LR = 1e-6
SMALL = Workload(
    "transformer of 11 blocks, 25.9 M parameters",
    lambda: Transformer(vocabulary=16384, width=384, layers=11, length=256),
    lambda size, side: torch.randint(16384, (size, side)),
    16384,
)
BASELINE = "DDP, torch Adam(amsgrad) fused"
PASSES = {"ddp": (1, 0), "divided": (0.5, 1), "ZeRO": (1, 1), "fsdp": (0.5, 2)}
"""How a step exchanges → all-reduces of the gradients, all-gathers of the parameters; a reduce-scatter is half of an
all-reduce."""


class OnTorch(StepBenchmark):
    """Time, wire traffic and memory of a training step on torch alone: the engines ddp and fsdp against torch's own.

    python -m benchmarks.step torch --ranks 2 4 --workloads resnet50
    python -m benchmarks.step torch --device cuda --batch 32 --side 224
    """

    baseline = BASELINE
    peers = (
        "engine ddp",
        "engine ddp, shard_update",
        "engine fsdp",
        "DDP, ARSG fused",
        BASELINE,
        "DDP, ZeroRedundancyOptimizer(Adam, amsgrad, fused)",
        "fully_shard, ARSG fused",
    )
    exchanged: Mapping[str, str] = dict(
        zip(peers, ("ddp", "divided", "fsdp", "ddp", "ddp", "ZeRO", "fsdp"), strict=True)
    )
    variant = "micro-batch"
    variants = (1, 2, 4)
    settings = ("rows",)
    headings = (
        "optimizer | whole step ms | × {baseline} | its own step ms | × {baseline} | passes ms | exchange alone ms "
        "| hidden | state MB/rank | sent MB/rank and step | peak MB/rank"
    )
    workloads: Mapping[str, Workload] = {**WORKLOADS, "small": SMALL}

    def add_options(self, parser: ArgumentParser) -> None:
        """Add rows of steps."""
        parser.add_argument("--rows", type=int, default=3, help="rows of steps timed each time")
        parser.set_defaults(steps=3, variants=[1])

    def table_name(self, arguments: Namespace) -> str:
        """Return the name of the results' files."""
        return "torch"

    def launcher(self, device: str, ranks: int, variant: int) -> list[str]:
        """Return the command of torchrun."""
        program = str(Path(sys.executable).with_name("torchrun"))
        return [program, "--standalone", "--nproc-per-node", str(ranks), "-m"]

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the job, and leave it at the end. Collective."""
        from arsg_dist.engine import connect_torch, discover_ranks

        communicator = connect_torch(discover_ranks())
        yield
        communicator.close()

    def measure(self, peer: str, workload: str, variant: int, arguments: Namespace) -> dict[str, Any]:
        """Return median milliseconds of a step and of its parts, and what this rank holds. Collective."""
        found = self._steps(peer, workload, variant, arguments)
        gc.collect()
        numel = sum(parameter.numel() for parameter in on_meta(self.workloads[workload]).parameters())
        device = (
            torch.device("cuda", torch.cuda.current_device())
            if arguments.device == "cuda"
            else torch.device("cpu")
        )
        call = exchange_alone(self.exchanged[peer], numel, variant, device)
        found["alone"] = statistics.median(timed_row(call, 1, device) for _ in range(3))
        return found

    def _steps(self, peer: str, workload: str, variant: int, arguments: Namespace) -> dict[str, Any]:
        cuda = arguments.device == "cuda"
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        torch.manual_seed(0)
        memory = PeakMemory(arguments.device)
        held = memory.start()
        model = self.workloads[workload].model().to(device)
        inputs, labels = (
            tensor.to(device) for tensor in self.workloads[workload].batch(arguments.batch, arguments.side)
        )

        def passes() -> None:
            for _ in range(variant):
                torch.autograd.grad(mean_loss(model(inputs), labels), list(model.parameters()))

        computed = [timed_row(passes, arguments.steps, device) for _ in range(1 + arguments.rows)]
        step, optimizer = prepared(peer, model, variant, inputs, labels)
        own, plain = 0.0, optimizer.step

        def timed(*positional: Any, **keywords: Any) -> Any:
            nonlocal own
            begin = now(device)
            result = plain(*positional, **keywords)
            own += now(device) - begin
            return result

        optimizer.step = timed  # type: ignore[method-assign]
        whole, stepping = [], []
        for _ in range(1 + arguments.rows):  # the first warms up
            own = 0.0
            whole.append(timed_row(step, arguments.steps, device))
            stepping.append(own / arguments.steps)
        return {
            "whole": statistics.median(whole[1:]),
            "own": statistics.median(stepping[1:]),
            "compute": statistics.median(computed[1:]),
            "state": state_bytes(optimizer),
            "peak": memory.peak() - held,
        }

    def head(self, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return the report's title, and lines that say what the columns are."""
        return f"Training step on torch alone on {settings['device']}", [
            f"every optimizer made {settings['rounds']} times, {settings['rows']} rows of {settings['steps']} steps "
            "each time; medians; ratios are medians over rounds of ratios within a round",
            "whole step: forward, backward, exchange and update, in rows of steps; its own step: the optimizer's "
            "`step()` inside; passes: forward and backward on the undistributed model, all ranks at once; exchange "
            "alone: as many bytes by the same collectives, 25 MB at a time, nothing beside them",
            "hidden: the share of the exchange that the step does not take beyond passes and optimizer; sent: of a "
            "ring, computed from the sizes; peak: largest memory beyond what the process held before the model",
            "plain classes are used as quickly as they go: broadcast_buffers=False, gradient_as_bucket_view=True, "
            "blocks sharded one by one",
        ]

    def cells(self, peer: str, rounds: Rounds, baseline: Rounds, workload: str, ranks: int) -> list[str]:
        """Return a row of the table from the name of the optimizer on."""
        cells = [peer]
        for key in ("whole", "own"):
            cells += [f"{median(rounds, key):.1f}", f"{ratio(rounds, baseline, key):.3f}"]
        cells += [f"{median(rounds, key):.1f}" for key in ("compute", "alone")]
        cells += [hidden(rounds) if ranks > 1 else "–", f"{median(rounds, 'state') / 1e6:.1f}"]
        sent = wire_bytes(self.exchanged[peer], self.workloads[workload], ranks)
        return [*cells, f"{sent / 1e6:.1f}", f"{median(rounds, 'peak') / 1e6:.0f}"]


def now(device: torch.device) -> float:
    """Return milliseconds, when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def timed_row(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Return milliseconds per call, of a row of calls that all ranks begin together. Collective."""
    dist.barrier()
    begin = now(device)
    for _ in range(count):
        call()
    return (now(device) - begin) / count


def prepared(
    peer: str, model: nn.Module, micro_batches: int, inputs: torch.Tensor, labels: torch.Tensor
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Distribute a model; return what makes a whole step, and the optimizer that steps in it."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    from arsg_dist import ARSG
    from arsg_dist.ddp import DDPEngine, Shards
    from arsg_dist.engine import Engine, TorchCommunicator
    from arsg_dist.fsdp import FSDPEngine, shard

    adam: dict[str, Any] = {"lr": LR, "amsgrad": True, "fused": True}
    if peer.startswith("engine"):
        communicator = TorchCommunicator(inputs.device)
        engine: Engine
        if peer == "engine fsdp":
            shard(model)
            optimizer: torch.optim.Optimizer = ARSG(model.parameters(), LR)
            engine = FSDPEngine(model, optimizer, communicator, accumulation_steps=micro_batches)
        else:
            shards = Shards(model.parameters()) if "shard_update" in peer else None
            optimizer = ARSG(shards.groups if shards else model.parameters(), LR)
            engine = DDPEngine(
                model, optimizer, communicator, accumulation_steps=micro_batches, shards=shards
            )

        def step_of_engine() -> None:
            for _ in range(micro_batches):
                engine.backward(mean_loss(engine.module(inputs), labels))
                engine.step()

        return step_of_engine, optimizer
    sharded = peer.startswith("fully_shard")
    if sharded:
        shard(model)
        module: Any = model
    else:
        devices = [inputs.device] if inputs.is_cuda else None
        module = DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    stepping: Any
    if "ZeroRedundancyOptimizer" in peer:
        stepping = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, **adam)
        optimizer = stepping.optim
    elif "ARSG" in peer:
        stepping = optimizer = ARSG(model.parameters(), LR)
    else:
        stepping = optimizer = torch.optim.Adam(model.parameters(), **adam)

    def step() -> None:
        for micro_batch in range(micro_batches):
            last = micro_batch + 1 == micro_batches
            if sharded:
                module.set_requires_gradient_sync(last)
            with nullcontext() if last or sharded else module.no_sync():
                (mean_loss(module(inputs), labels) / micro_batches).backward()
        stepping.step()
        stepping.zero_grad()

    return step, optimizer


def exchange_alone(kind: str, numel: int, micro_batches: int, device: torch.device) -> Callable[[], None]:
    """Return what exchanges as much as a step does, by the same collectives. Collective."""
    ranks = dist.get_world_size()
    size = min(25 * 2**20 // 4, numel) // ranks * ranks
    whole, part = torch.zeros(size, device=device), torch.zeros(size // ranks, device=device)
    received = torch.zeros_like(whole)
    gathers = PASSES[kind][1] * (micro_batches if kind == "fsdp" else 1)

    def gather() -> None:
        if kind == "fsdp" or device.type != "cpu":
            dist.all_gather_into_tensor(whole, part)
            return
        sent = [dist.broadcast(x, source, async_op=True) for source, x in enumerate(whole.chunk(ranks))]
        for work in sent:
            work.wait()

    def call() -> None:
        for _ in range(-(-numel // size)):
            if kind in ("ddp", "ZeRO"):
                dist.all_reduce(whole)
            elif kind == "fsdp" or device.type != "cpu":
                dist.reduce_scatter_tensor(part, whole)
            else:
                dist.all_to_all_single(received, whole)
            for _ in range(gathers):
                gather()

    return call


def on_meta(workload: Workload) -> nn.Module:
    """Make a workload's model without its memory."""
    with torch.device("meta"):
        return workload.model()


def hidden(rounds: Rounds) -> str:
    """Return the share of the exchange that does not show in the step; none if all of it does."""
    share = statistics.median(
        1 - (each["whole"] - each["compute"] - each["own"]) / each["alone"] for each in rounds
    )
    return f"{min(share, 1.0):.0%}" if share > 0 else "none"


def wire_bytes(kind: str, workload: Workload, ranks: int) -> float:
    """Return the bytes a rank sends per step of one micro-batch in a ring, for fp32."""
    size = sum(parameter.numel() for parameter in on_meta(workload).parameters())
    reduces, gathers = PASSES[kind]
    return (2 * reduces + gathers) * 4 * size * (ranks - 1) / ranks
