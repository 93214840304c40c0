"""Time, communication and memory of a training step under DeepSpeed's ZeRO: ARSG against Adam.

Started plainly, this starts one job per number of ranks under the deepspeed launcher. A job makes an engine for every
optimizer in turn, in random order, several rounds of them, so that a load on the machine meets all; ratios are medians
over rounds of ratios within a round. Examples:

    python benchmarks/zero_step.py --ranks 1 2
    python benchmarks/zero_step.py --ranks 4 --stages 1    # more rows for the same table
    python benchmarks/zero_step.py --device cuda --precision bf16 --batch 32 --side 224 --workloads resnet50
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from kept_results import KeptResults
from machine import PeakMemory, device_name
from workloads import WORKLOADS, mean_loss
from zero_step_report import BASELINE, PEERS, report_of

SETTINGS = ("device", "offload", "precision", "batch", "side", "rounds", "steps")
"""What all measurements of a table have in common."""


def parsed() -> argparse.Namespace:
    """The command line; the job under the launcher gets the driver's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=["ARSG", BASELINE, "torch AdamW"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--stages", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3])
    parser.add_argument("--offload", action="store_true", help="optimizer state on the CPU (stages 1 to 3)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=2, help="samples per rank")
    parser.add_argument("--side", type=int, default=32, help="image side, or tokens per sample")
    parser.add_argument("--rounds", type=int, default=3, help="engines made for every optimizer")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per engine")
    parser.add_argument(
        "--output", type=Path, help="Markdown file (default: benchmarks/results/...), with .json"
    )
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if BASELINE not in arguments.peers:
        parser.error(f"--peers must name {BASELINE}, with which the others are compared")
    return arguments


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
    elif peer == "ARSG, plain torch":
        config["optimizer"] = {"type": "ARSG", "params": {"lr": 1e-6, "foreach": False}}
    elif peer == BASELINE:
        config["optimizer"] = {"type": "Adam", "params": {"lr": 1e-6}}
    return config


def client_optimizer(peer: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
    """torch's, which DeepSpeed gets no type name for."""
    if peer == "torch AdamW":
        return torch.optim.AdamW(parameters, 1e-6, fused=True)
    if peer == "torch AdamW, plain":
        return torch.optim.AdamW(parameters, 1e-6, foreach=False)
    if peer == "torch Adam(amsgrad)":
        return torch.optim.Adam(parameters, 1e-6, amsgrad=True, fused=True)
    return None


def measure(peer: str, workload: str, stage: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine: median milliseconds of the update, of the optimizer in it and of the whole step, and what this rank
    holds and sends."""
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
    optimizer = StepTimer(engine.basic_optimizer, arguments)
    alone, update, whole = [], [], []
    for step in range(2 + arguments.steps):
        comm.comms_logger.comms_dict.clear()
        comm.comms_logger.prof_all = step == 1  # it waits for each operation, which would spoil a timed step
        synchronize(arguments)
        begin = time.perf_counter()
        engine.backward(mean_loss(engine(inputs), labels))
        synchronize(arguments)
        optimizer.seconds = 0.0
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
            alone.append(1e3 * optimizer.seconds)
            update.append(1e3 * (end - middle))
            whole.append(1e3 * (end - begin))
    state = sum(
        value.numel() * value.element_size()
        for state in engine.basic_optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    result = {
        "optimizer": statistics.median(alone),
        "update": statistics.median(update),
        "whole": statistics.median(whole),
        "state": state,
        "sent": sent,
        "peak": memory.peak() - held,
        "class": type(engine.basic_optimizer).__name__,
    }
    optimizer.remove()
    engine.destroy()
    del engine, optimizer, model, parameters
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    return result


class StepTimer:
    """Adds up the time of an optimizer's own `step`, without what DeepSpeed does around it.

    Attributes:
        seconds: so far.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, arguments: argparse.Namespace) -> None:
        self.seconds, self._optimizer, step = 0.0, optimizer, optimizer.step
        wait = torch.cuda.synchronize if arguments.device == "cuda" else bool

        def timed(*positional: Any, **keywords: Any) -> Any:
            wait()
            begin = time.perf_counter()
            result = step(*positional, **keywords)
            wait()
            self.seconds += time.perf_counter() - begin
            return result

        optimizer.step = timed  # type: ignore[method-assign]

    def remove(self) -> None:
        """Gives the optimizer its own `step` back."""
        del self._optimizer.step


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
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    order = random.Random(0)  # the same on every rank
    for workload in arguments.workloads:
        for stage in arguments.stages:
            for _ in range(arguments.rounds):
                for peer in order.sample(arguments.peers, len(arguments.peers)):
                    result = measure(peer, workload, stage, arguments)
                    results.setdefault(f"{workload}/{stage}", {}).setdefault(peer, []).append(result)
                    if torch.distributed.get_rank() == 0:
                        print(workload, stage, peer, json.dumps(result), flush=True)
                        arguments.job.write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    end_process(0)


# The driver ----------------------------------------------------------------------------------------------------------


def driver(arguments: argparse.Namespace) -> None:
    """Starts the jobs, adds what they measured to earlier results and writes the report."""
    name = f"zero_step_{arguments.device}_{arguments.precision}{'_offload' if arguments.offload else ''}"
    output = arguments.output or Path(__file__).parent / "results" / f"{name}.md"
    settings = {key: getattr(arguments, key) for key in SETTINGS}
    kept = KeptResults(
        output, settings | {"torch": torch.__version__, "machine": device_name(arguments.device)}
    )
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as directory:
            measured = Path(directory) / "results.json"
            launcher = [Path(sys.executable).with_name("deepspeed")]
            launcher += (
                ["--num_accelerators", str(ranks)]
                if arguments.device == "cpu"
                else ["--num_gpus", str(ranks)]
            )
            subprocess.run([*launcher, __file__, *sys.argv[1:], "--job", measured], check=True)
            new = json.loads(measured.read_text())
        kept.add({f"{row}/{ranks}": peers for row, peers in new.items()})
    kept.write_table(report_of(kept))


if __name__ == "__main__":
    arguments = parsed()
    if arguments.job:
        job(arguments)
    else:
        driver(arguments)
