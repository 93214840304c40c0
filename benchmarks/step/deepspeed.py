"""A training step under DeepSpeed's ZeRO: ARSG against Adam."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import PeakMemory, state_bytes
from benchmarks.common.workloads import mean_loss
from benchmarks.step.engine import PassesAndUpdate, median, stepper


class DeepSpeed(PassesAndUpdate):
    """Time, communication and memory of a training step under DeepSpeed's ZeRO: ARSG against Adam.

    python -m benchmarks.step deepspeed --ranks 1 2
    python -m benchmarks.step deepspeed --ranks 4 --stages 1    # more rows for the same table
    python -m benchmarks.step deepspeed --device cuda --precision bf16 --batch 32 --side 224 --workloads resnet50
    """

    baseline = "DeepSpeed Adam"
    traffic: Mapping[str, int] = {
        "ARSG": 36, "ARSG, plain torch": 36, baseline: 28, "torch AdamW": 28, "torch AdamW, plain": 28,
        "torch Adam(amsgrad)": 36,
    }  # fmt: skip
    peers = tuple(traffic)
    variant = "stage"
    variants = (0, 1, 2, 3)
    settings = ("offload", "precision")

    def add_options(self, parser: ArgumentParser) -> None:
        """Add offloading and precision, and leave peers out."""
        parser.set_defaults(peers=["ARSG", self.baseline, "torch AdamW"])
        parser.add_argument(
            "--offload", action="store_true", help="optimizer state on the CPU (stages 1 to 3)"
        )
        parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")

    def table_name(self, arguments: Namespace) -> str:
        """Return the name of the results' files."""
        return f"deepspeed_{arguments.precision}{'_offload' if arguments.offload else ''}"

    def launcher(self, device: str, ranks: int, variant: int) -> list[str]:
        """Return the command of the deepspeed launcher."""
        count = "--num_accelerators" if device == "cpu" else "--num_gpus"
        program = str(Path(sys.executable).with_name("deepspeed"))
        return [program, count, str(ranks), "--no_local_rank", "--module"]

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the job, and leave it at the end. Collective."""
        import deepspeed
        from deepspeed.utils import logger

        import arsg_dist.deepspeed

        logger.setLevel("ERROR")
        deepspeed.init_distributed(verbose=False)
        arsg_dist.deepspeed.release_shared_memory()
        yield
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    def measure(self, peer: str, workload: str, variant: int, arguments: Namespace) -> dict[str, Any]:
        """Train one engine; what it takes, holds and sends on this rank. Collective."""
        import deepspeed
        from deepspeed.comm import comm

        memory = PeakMemory(arguments.device)
        torch.manual_seed(0)
        held = memory.start()
        model = self.workloads[workload].model()
        parameters = list(model.parameters())
        config, optimizer = engine_config(peer, variant, arguments), client_optimizer(peer, parameters)
        engine, *_ = deepspeed.initialize(None, model, optimizer, parameters, config=config)
        batch = self.workloads[workload].batch(arguments.batch, arguments.side)
        inputs, labels = (tensor.to(engine.device) for tensor in batch)
        if arguments.precision == "bf16" and inputs.is_floating_point():
            inputs = inputs.bfloat16()

        def passes() -> None:
            engine.backward(mean_loss(engine(inputs), labels))

        step = stepper(engine.basic_optimizer, passes, engine.step, arguments.device)
        step()  # the first two warm up
        log = comm.comms_logger
        log.comms_dict.clear()
        log.prof_all = True  # it waits for each operation, which would spoil a timed step
        step()
        log.prof_all = False
        sizes = {name: by_size.items() for name, by_size in log.comms_dict.items()}
        sent = {name: sum(size * record[0] for size, record in found) for name, found in sizes.items()}
        timed = [step() for _ in range(arguments.steps)]
        result = {
            **{key: median(timed, key) for key in timed[0]},
            "state": state_bytes(engine.basic_optimizer),
            "sent": sent,
            "peak": memory.peak() - held,
            "class": type(engine.basic_optimizer).__name__,
        }
        engine.destroy()
        return result

    def head(self, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return the report's title, and lines that say what the columns are."""
        title = f"Training step under ZeRO on {settings['device']}, {settings['precision']}"
        return title + (", optimizer state offloaded to the CPU" if settings["offload"] else ""), [
            f"{settings['rounds']} engines per optimizer, {settings['steps']} timed steps each; medians; ratios are "
            "medians over rounds of ratios within a round",
            "its own step: the optimizer's `step()` inside the update; by bytes: the ratio of the least memory "
            "traffic of the two; update: `engine.step()`, with the communication that belongs to it; sent: sizes "
            "that DeepSpeed's communication log counts in one step; peak: largest memory beyond what the process "
            "held before the model",
        ]


def engine_config(peer: str, stage: int, arguments: Namespace) -> dict[str, Any]:
    """Return the DeepSpeed config of one measurement."""
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
        offload = {"device": "cpu", "pin_memory": arguments.device == "cuda"}
        config["zero_optimization"]["offload_optimizer"] = offload
        config["zero_force_ds_cpu_optimizer"] = False
    named: dict[str, dict[str, Any]] = {
        "ARSG": {"type": "ARSG", "params": {"lr": 1e-6}},
        "ARSG, plain torch": {"type": "ARSG", "params": {"lr": 1e-6, "foreach": False}},
        DeepSpeed.baseline: {
            "type": "Adam",
            "params": {"lr": 1e-6, "torch_adam": not has_fused_adam(arguments.device)},
        },
    }
    if peer in named:
        config["optimizer"] = named[peer]
    return config


def has_fused_adam(device: str) -> bool:
    """Say whether DeepSpeed has its own Adam for a device at hand: for GPUs it would be compiled here, in minutes.

    Where it is not built, "Adam" is torch's, and the table says so behind its name.
    """
    from deepspeed.git_version_info import installed_ops

    return device != "cuda" or bool(installed_ops.get("fused_adam"))


def client_optimizer(peer: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
    """Return torch's, which DeepSpeed gets no type name for."""
    if peer == "torch Adam(amsgrad)":
        return torch.optim.Adam(parameters, 1e-6, amsgrad=True, fused=True)
    kinds: dict[str, dict[str, bool]] = {
        "torch AdamW": {"fused": True},
        "torch AdamW, plain": {"foreach": False},
    }
    return torch.optim.AdamW(parameters, 1e-6, **kinds[peer]) if peer in kinds else None
