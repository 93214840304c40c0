"""Time, communication and memory of a training step under DeepSpeed's ZeRO: ARSG against Adam.

Started plainly, this starts one job per number of ranks under the deepspeed launcher. A job makes an engine for every
optimizer in turn, in random order, several rounds of them, so that a load on the machine meets all; ratios are medians
over rounds of ratios within a round. Examples:

    python benchmarks/zero_step.py --ranks 1 2
    python benchmarks/zero_step.py --device cuda --precision bf16 --batch 32 --side 224 --workloads resnet50
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

BASELINE = "DeepSpeed Adam"
PEERS = ["ARSG", BASELINE, "torch AdamW", "torch Adam(amsgrad)"]
BYTES = {"ARSG": 36, BASELINE: 28, "torch AdamW": 28, "torch Adam(amsgrad)": 36}
"""Least memory traffic of the update, per fp32 parameter: x, g and the state read, x and the state written."""


def parsed() -> argparse.Namespace:
    """The command line; the job under the launcher gets the driver's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3])
    parser.add_argument("--offload", action="store_true", help="optimizer state on the CPU (stages 1 to 3)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=2, help="samples per rank")
    parser.add_argument("--side", type=int, default=32, help="image side, or tokens per sample")
    parser.add_argument("--rounds", type=int, default=3, help="engines made for every optimizer")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per engine")
    parser.add_argument("--output", type=Path, help="Markdown file (default: benchmarks/results/...)")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


# The job on every rank -----------------------------------------------------------------------------------------------


def engine_config(peer: str, stage: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed config of one measurement."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": arguments.batch,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "comms_logger": {"enabled": True, "prof_all": False},
        "zero_allow_untested_optimizer": True,
    }
    if arguments.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if arguments.offload and stage:
        config["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": arguments.device == "cuda",
        }
        config["zero_force_ds_cpu_optimizer"] = False
    if peer == "ARSG":
        config["optimizer"] = {"type": "ARSG", "params": {"lr": 1e-6}}
    elif peer == BASELINE:
        config["optimizer"] = {"type": "Adam", "params": {"lr": 1e-6}}
    return config


def client_optimizer(peer: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
    """torch's fused ones, which DeepSpeed gets no type name for."""
    if peer == "torch AdamW":
        return torch.optim.AdamW(parameters, 1e-6, fused=True)
    if peer == "torch Adam(amsgrad)":
        return torch.optim.Adam(parameters, 1e-6, amsgrad=True, fused=True)
    return None


def measure(peer: str, workload: str, stage: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine: median milliseconds of the update and of the whole step, and what this rank holds and sends."""
    import deepspeed
    from deepspeed.comm import comm

    memory = PeakMemory(arguments.device)
    torch.manual_seed(0)
    held = memory.start()
    model = WORKLOADS[workload].model()
    parameters = list(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        config=engine_config(peer, stage, arguments),
        optimizer=client_optimizer(peer, parameters),
    )
    inputs, labels = (t.to(engine.device) for t in WORKLOADS[workload].batch(arguments.batch, arguments.side))
    if arguments.precision == "bf16" and inputs.is_floating_point():
        inputs = inputs.bfloat16()
    update, whole = [], []
    for step in range(2 + arguments.steps):
        comm.comms_logger.comms_dict.clear()
        comm.comms_logger.prof_all = step == 1  # it waits for each operation, which would spoil a timed step
        synchronize(arguments)
        begin = time.perf_counter()
        engine.backward(mean_loss(engine(inputs), labels))
        synchronize(arguments)
        middle = time.perf_counter()
        engine.step()
        synchronize(arguments)
        end = time.perf_counter()
        if step == 1:
            sent = {
                name: sum(size * record[0] for size, record in sizes.items())
                for name, sizes in comm.comms_logger.comms_dict.items()
            }
        if step > 1:
            update.append(1e3 * (end - middle))
            whole.append(1e3 * (end - begin))
    state = sum(
        value.numel() * value.element_size()
        for state in engine.basic_optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    result = {
        "update": statistics.median(update),
        "whole": statistics.median(whole),
        "state": state,
        "sent": sent,
        "peak": memory.peak() - held,
        "class": type(engine.basic_optimizer).__name__,
    }
    engine.destroy()
    del engine, model, parameters
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    return result


def synchronize(arguments: argparse.Namespace) -> None:
    """Waits for the GPU and for the other ranks."""
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    torch.distributed.barrier()


def job(arguments: argparse.Namespace) -> None:
    """All measurements on this number of ranks; rank 0 writes them."""
    import deepspeed
    from deepspeed.utils import logger

    import arsg_dist.deepspeed
    from arsg_dist.engine import end_process

    logger.setLevel("ERROR")
    deepspeed.init_distributed(verbose=False)
    arsg_dist.deepspeed.release_shared_memory()
    if arguments.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // torch.distributed.get_world_size()))
    results: dict[str, list[dict[str, Any]]] = {}
    order = random.Random(0)  # the same on every rank
    for workload in arguments.workloads:
        for stage in arguments.stages:
            for _ in range(arguments.rounds):
                for peer in order.sample(PEERS, len(PEERS)):
                    result = measure(peer, workload, stage, arguments)
                    results.setdefault(f"{workload}/{stage}/{peer}", []).append(result)
                    if torch.distributed.get_rank() == 0:
                        print(workload, stage, peer, json.dumps(result), flush=True)
                        arguments.job.write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    end_process(0)


# The driver ----------------------------------------------------------------------------------------------------------


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    """Median over rounds."""
    return statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))


def table(workload: str, results: dict[int, dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """Rows of Markdown for one model."""
    lines = [
        "| stage | ranks | optimizer | update ms | × DeepSpeed Adam | of that by bytes | whole step ms "
        "| × DeepSpeed Adam | state MB/rank | sent MB/rank and step | peak MB/rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in arguments.stages:
        for ranks, all_peers in results.items():
            baseline = all_peers.get(f"{workload}/{stage}/{BASELINE}", [])
            for peer in PEERS:
                rounds = all_peers.get(f"{workload}/{stage}/{peer}", [])
                if not baseline or len(rounds) != len(baseline):
                    continue
                last = rounds[-1]
                lines.append(
                    f"| {stage} | {ranks} | {peer} ({last['class']}) "
                    f"| {statistics.median(r['update'] for r in rounds):.1f} "
                    f"| {ratio(rounds, baseline, 'update'):.2f} | {BYTES[peer] / BYTES[BASELINE]:.2f} "
                    f"| {statistics.median(r['whole'] for r in rounds):.0f} "
                    f"| {ratio(rounds, baseline, 'whole'):.2f} "
                    f"| {last['state'] / 1e6:.1f} | {sum(last['sent'].values()) / 1e6:.1f} "
                    f"| {statistics.median(r['peak'] for r in rounds) / 1e6:.0f} |"
                )
    return lines


def driver(arguments: argparse.Namespace) -> None:
    """Starts the jobs and writes the report."""
    results: dict[int, dict[str, Any]] = {}
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as directory:
            output = Path(directory) / "results.json"
            launcher = [Path(sys.executable).with_name("deepspeed")]
            launcher += (
                ["--num_accelerators", str(ranks)]
                if arguments.device == "cpu"
                else ["--num_gpus", str(ranks)]
            )
            subprocess.run([*launcher, __file__, *sys.argv[1:], "--job", output], check=True)
            results[ranks] = json.loads(output.read_text())
    name = f"zero_step_{arguments.device}_{arguments.precision}{'_offload' if arguments.offload else ''}"
    report = [
        f"# Training step under ZeRO on {arguments.device}, {arguments.precision}"
        + (", optimizer state offloaded to the CPU" if arguments.offload else ""),
        "",
        f"- device: {device_name(arguments.device)}",
        f"- torch {torch.__version__}; {arguments.batch} samples of side/length {arguments.side} per rank",
        f"- {arguments.rounds} engines per optimizer, {arguments.steps} timed steps each; medians",
        "- update: `engine.step()`, with the communication that belongs to it; of that by bytes: the ratio of the "
        "least memory traffic of the two updates; sent: sizes that DeepSpeed's communication log counts in one step; "
        "peak: largest memory beyond what the process held before the model",
        f"- command: `{shlex.join(['python', 'benchmarks/zero_step.py', *sys.argv[1:]])}`",
        "",
    ]
    for workload in arguments.workloads:
        report += [f"## {WORKLOADS[workload].title}", "", *table(workload, results, arguments), ""]
    output = arguments.output or Path(__file__).parent / "results" / f"{name}.md"
    output.write_text("\n".join(report))
    print("\n".join(report), f"\nwritten to {output}")


if __name__ == "__main__":
    arguments = parsed()
    if arguments.job:
        job(arguments)
    else:
        driver(arguments)
