"""Time of one optimizer step against its peers and against the memory bandwidth, measured in the same run.

Every peer steps the same parameters and gradients. The peers take turns within each round, in random order, so that
a load on the machine and what the predecessor left behind meet all of them; ratios are medians over rounds of ratios
within a round. Example:

    python -m benchmarks.optimizer_step --threads 2
    python -m benchmarks.optimizer_step --device cuda
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from arsg_dist import ARSG
from arsg_dist.optim.kernels import fused
from benchmarks.common.kept_results import machine_results, median_ratio, this_command
from benchmarks.common.machine import PeakMemory, device_ms, device_name, state_bytes, wall_ms
from benchmarks.common.workloads import WORKLOADS

Params = list[torch.nn.Parameter]
BASELINE = "torch Adam(amsgrad) fused"
COPY = "copy (limit)"
SCALE = "scale in place (limit)"


def shapes_of(workload: str) -> list[tuple[int, ...]]:
    """Shapes of a model's parameters."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in WORKLOADS[workload].model().parameters()]


def numel(shapes: list[tuple[int, ...]]) -> int:
    """Number of elements."""
    return sum(torch.Size(shape).numel() for shape in shapes)


CASES: dict[str, tuple[str, Callable[[], list[tuple[int, ...]]]]] = {
    "resnet50": ("161 tensors of ResNet-50, 25.6 M parameters", lambda: shapes_of("resnet50")),
    "resnet50-flat": (
        "ResNet-50 as one flat tensor, 25.6 M parameters",
        lambda: [(numel(shapes_of("resnet50")),)],
    ),
    "transformer": (
        "148 tensors of a transformer (GPT-2 small), 124.4 M parameters",
        lambda: shapes_of("transformer"),
    ),
    "eighth-of-7b": ("an eighth of 7 billion parameters as one flat tensor", lambda: [(875_000_000,)]),
    "small": ("300 tensors, 0.1 M parameters, for a rehearsal", lambda: [(k + 1, 2) for k in range(300)]),
}
COMMON_CASES = ("resnet50", "resnet50-flat", "transformer")


@dataclass
class Peer:
    """What is timed; `bytes_per_element` is the least a step can move: each tensor read and written once."""

    name: str
    bytes_per_element: int
    make: Callable[[Params], torch.optim.Optimizer]
    devices: tuple[str, ...] = ("cpu", "cuda")
    optional: bool = False


@dataclass
class Running:
    """A peer set up on a workload, with its measurements."""

    name: str
    bytes_per_step: int
    step: Callable[[], object]
    optimizer: torch.optim.Optimizer | None = None
    first_ms: float = 0.0
    ms: list[float] = field(default_factory=list)


class CompiledARSG(ARSG):
    """ARSG whose CPU tensors take the code meant for accelerators."""

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        """One step through `compiled_step`."""
        with mock.patch.object(fused, "_cpu_step", fused.compiled_step):
            return super().step(closure)


def deepspeed_cpu_adam(params: Params) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for offloaded state (compiles its kernel on first use)."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, lr=1e-6, fp32_optimizer_states=True)


def qhadam(params: Params) -> torch.optim.Optimizer:
    """The closest relative of ARSG's Adam mode."""
    from pytorch_optimizer import QHAdam

    return QHAdam(params, lr=1e-6)


def in_bf16(params: Params) -> Params:
    """Parameters and gradients in bfloat16 in the place of these."""
    copies = [torch.nn.Parameter(param.detach().bfloat16()) for param in params]
    for one in copies:
        one.grad = torch.randn_like(one)
    return copies


PEERS = [
    Peer("torch Adam(amsgrad) loop", 36, lambda p: torch.optim.Adam(p, 1e-6, amsgrad=True, foreach=False)),
    Peer("torch Adam(amsgrad) foreach", 36, lambda p: torch.optim.Adam(p, 1e-6, amsgrad=True, foreach=True)),
    Peer(BASELINE, 36, lambda p: torch.optim.Adam(p, 1e-6, amsgrad=True, fused=True)),
    Peer("torch AdamW fused", 28, lambda p: torch.optim.AdamW(p, 1e-6, fused=True)),
    Peer("torch SGD(momentum) fused", 20, lambda p: torch.optim.SGD(p, 1e-6, momentum=0.9, fused=True)),
    Peer("DeepSpeed CPUAdam", 28, deepspeed_cpu_adam, devices=("cpu",)),
    Peer("pytorch_optimizer QHAdam", 28, qhadam),
    Peer("ARSG reference", 36, lambda p: ARSG(p, 1e-6, foreach=False)),
    Peer("ARSG foreach", 36, lambda p: ARSG(p, 1e-6, foreach=True)),
    Peer("ARSG fused", 36, lambda p: ARSG(p, 1e-6, fused=True)),
    Peer("ARSG fused, bf16 state", 24, lambda p: ARSG(p, 1e-6, fused=True, state_dtype="bfloat16")),
    Peer("ARSG fused, 8-bit state", 18, lambda p: ARSG(p, 1e-6, fused=True, state_dtype="8bit")),
    Peer(
        "ARSG fused, bf16 parameters, split masters, 8-bit state",
        16,
        lambda p: ARSG(in_bf16(p), 1e-6, fused=True, state_dtype="8bit", master="split"),
    ),
    Peer("ARSG torch.compile", 36, lambda p: CompiledARSG(p, 1e-6, fused=True), ("cpu",), optional=True),
]


def set_up(shapes: list[tuple[int, ...]], arguments: argparse.Namespace) -> tuple[list[Running], list[str]]:
    """All peers on one workload, warmed up, and why others are missing."""
    params = [torch.nn.Parameter(torch.randn(shape, device=arguments.device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    size = numel(shapes)
    source, target = torch.randn(size, device=arguments.device), torch.empty(size, device=arguments.device)
    running = [
        Running(COPY, 8 * size, lambda: target.copy_(source)),
        Running(SCALE, 8 * size, lambda: source.mul_(1.0)),
    ]
    skipped = []
    for peer in PEERS:
        if arguments.device not in peer.devices or (peer.optional and not arguments.compiled):
            continue
        if arguments.only and not any(word in peer.name for word in [*arguments.only, BASELINE]):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # a fall-back must not pass for the real thing
                optimizer = peer.make(params)
                first_ms = wall_ms(optimizer.step, arguments.device)
        except Exception as error:
            skipped.append(f"{peer.name}: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
            continue
        running.append(Running(peer.name, peer.bytes_per_element * size, optimizer.step, optimizer, first_ms))
    for one in running:
        device_ms(one.step, arguments.device)
    return running, skipped


def measure(running: list[Running], arguments: argparse.Namespace) -> None:
    """Fill in the times, peers taking turns."""
    order = random.Random(0)
    for _ in range(arguments.rounds):
        for one in order.sample(running, len(running)):
            one.ms.append(device_ms(one.step, arguments.device))


def table(running: list[Running]) -> list[str]:
    """Rows of Markdown."""
    by_name = {one.name: one for one in running}
    copy, scale = by_name[COPY], by_name[SCALE]
    lines = [
        "| optimizer | median ms | min ms | × torch fused AMSGrad | the same of min ms | bytes/parameter "
        "| GB/s (min ms) | % of copy | % of scale in place | first step s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    size = copy.bytes_per_step // 8
    baseline = by_name[BASELINE]
    for one in running:
        percent = [
            f"{100 * median_ratio(limit.ms, one.ms) * one.bytes_per_step / limit.bytes_per_step:.0f}"
            for limit in (copy, scale)
        ]
        lines.append(
            f"| {one.name} | {statistics.median(one.ms):.2f} | {min(one.ms):.2f} "
            f"| {median_ratio(one.ms, baseline.ms):.2f} | {min(one.ms) / min(baseline.ms):.2f} "
            f"| {one.bytes_per_step // size} | {one.bytes_per_step / min(one.ms) / 1e6:.1f} "
            f"| {percent[0]} | {percent[1]} | {one.first_ms / 1e3:.2f} |"
        )
    return lines


def extra_bytes(step: Callable[[], object], device: str) -> int | None:
    """Peak memory during a step beyond what is held before it; None where the system does not tell."""
    memory = PeakMemory(device)
    try:
        before = memory.start()
        step()
        return max(0, memory.peak() - before)
    except OSError:
        return None


def memory_table(running: list[Running], size: int, device: str) -> list[str]:
    """State and temporary memory, measured on the flat tensor, where temporaries cannot hide in free lists."""
    lines = ["| optimizer | state bytes/parameter | temporary bytes/parameter in a step |", "|---|---|---|"]
    for one in running:
        if one.optimizer is not None:
            extra = extra_bytes(one.step, device)
            shown = "not measured" if extra is None else f"{extra / size:.2f}"
            lines.append(f"| {one.name} | {state_bytes(one.optimizer) / size:.1f} | {shown} |")
    return lines


def parsed() -> argparse.Namespace:
    """The command line."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads on CPU (default: torch's own choice)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of every peer (default: 15)")
    parser.add_argument("--workloads", nargs="+", choices=list(CASES), default=COMMON_CASES)
    parser.add_argument("--only", nargs="+", help="only peers whose name contains one of these words")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile on CPU (slow to compile)")
    parser.add_argument("--output", type=Path, help="Markdown file (default: benchmarks/results/...)")
    return parser.parse_args()


def main() -> None:
    """Measure and write the report."""
    arguments = parsed()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    threads = torch.get_num_threads()
    load_before = os.getloadavg()[0]
    cuda = f", CUDA {torch.version.cuda}" if arguments.device == "cuda" else ""
    report: list[str] = []
    for name in arguments.workloads:
        title, make_shapes = CASES[name]
        shapes = make_shapes()
        running, skipped = set_up(shapes, arguments)
        measure(running, arguments)
        section = [f"## {title}", "", *table(running), ""]
        section += [f"Skipped: {line}\n" for line in skipped]
        if name == "resnet50-flat":
            section += ["### Memory", "", *memory_table(running, numel(shapes), arguments.device), ""]
        print("\n".join(section), flush=True)
        report += section
        del running
        gc.collect()
    head = [
        f"# Optimizer step on {arguments.device}",
        "",
        f"- device: {device_name(arguments.device)}",
        f"- torch {torch.__version__}{cuda}, Python {platform.python_version()}, {threads} CPU thread(s)",
        f"- {arguments.rounds} rounds; ratios and percentages are medians over rounds",
        f"- load average {load_before:.1f} before, {os.getloadavg()[0]:.1f} after (own threads included)",
        f"- command: `{this_command()}`",
        "",
    ]
    default = machine_results(arguments.device) / f"optimizer_step/{threads}threads.md"
    output = arguments.output or default
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([*head, *report]))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
