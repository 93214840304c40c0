"""Train a few updates under each engine, against one process that does the same by hand, on the same device.

Horovod's launcher starts several ranks of it; else it is a job of one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from arsg_dist import ARSG
from arsg_dist.engine import Communicator, Engine, TrainingSettings, discover_ranks, end_process, load_builder
from benchmarks.gpu.runner import say

PARAMS: dict[str, Any] = {"lr": 1.0, "betas": [0.9, 0.99], "eps": 1e-2, "mu": 0.1, "weight_decay": 1e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH, UPDATES = 32, 5
# Of the way that training went. In half precision a rounding of the forward pass moves small gradients' signs.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.02}
FEW_BITS, FEW_BITS_TOLERANCE = "8-bit state", 0.15
"""End of a case's title, and how far it may be from float32 state."""


def model() -> nn.Module:
    """A network of several chunks and sizes that do not divide."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(61, 257), nn.Tanh(), nn.Linear(257, 129), nn.Tanh(), nn.Linear(129, 7))


def batch(update: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of an update."""
    generator = torch.Generator().manual_seed(update)
    return torch.randn(BATCH, 61, generator=generator), torch.randn(BATCH, 7, generator=generator)


def by_hand(precision: str, device: torch.device, *, casts: bool) -> dict[str, torch.Tensor]:
    """Train in one process.

    Args:
        precision: of forward and backward passes.
        device: to train on.
        casts: in half precision the network itself is cast, as DeepSpeed does; else autocast.
    """
    master = model().to(device)
    optimizer = ARSG(master.parameters(), foreach=False, **PARAMS)
    for update in range(UPDATES):
        inputs, targets = (tensor.to(device) for tensor in batch(update))
        network = master
        if casts and precision != "fp32":
            network = model().to(device)
            network.load_state_dict(master.state_dict())
            network, inputs = network.to(DTYPES[precision]), inputs.to(DTYPES[precision])
        autocast = precision != "fp32" and not casts
        with torch.autocast(device.type, dtype=DTYPES[precision], enabled=autocast):
            outputs = network(inputs)
        functional.mse_loss(outputs.float(), targets).backward()
        for ours, theirs in zip(master.parameters(), network.parameters(), strict=True):
            ours.grad = None if theirs.grad is None else theirs.grad.float()
        optimizer.step()
        optimizer.zero_grad()
    result = master if not casts or precision == "fp32" else master.to(DTYPES[precision])
    return {name: tensor.float().cpu() for name, tensor in result.state_dict().items()}


def params_of(title: str) -> dict[str, Any]:
    """Settings of the optimizer."""
    return PARAMS | ({"state_dtype": "8bit"} if title.endswith(FEW_BITS) else {})


def settings(precision: str, config_file: str | None, params: dict[str, Any]) -> TrainingSettings:
    """What a program asks of an engine."""
    return TrainingSettings(
        batch_size=BATCH,
        precision=precision,
        optimizer_type="ARSG",
        optimizer_params=params,
        parameter_groups=lambda network: [{"params": list(network.parameters())}],
        build_optimizer=lambda groups: ARSG(groups, **params),
        config_file=config_file,
    )


def trained(
    engine: Engine, communicator: Communicator, precision: str, *, casts: bool
) -> dict[str, torch.Tensor]:
    """Train under an engine, each rank on its share; return the weights on rank 0."""
    device = engine.device
    for update in range(UPDATES):
        inputs, targets = (
            tensor[communicator.rank :: communicator.world_size].to(device) for tensor in batch(update)
        )
        autocast = precision != "fp32" and not casts
        with torch.autocast(device.type, dtype=DTYPES[precision], enabled=autocast):
            outputs = engine.module(inputs.to(engine.input_dtype))
        engine.backward(functional.mse_loss(outputs.float(), targets))
        engine.step()
    return engine.whole_weights()


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a tensor, as a share of its way."""
    start = model().state_dict()
    return max(
        float((ours[name] - theirs[name]).norm() / (theirs[name] - start[name]).norm()) for name in theirs
    )


def cases(name: str, device: str, *, short: bool) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Return what to try of an engine: a title, a precision and, for DeepSpeed, the ZeRO section."""
    if name == "deepspeed":
        found = [(f"ZeRO {stage}", precision, {"stage": stage}) for precision in DTYPES for stage in range(4)]
        offload = {"device": "cpu", "pin_memory": device == "cuda"}
        for precision in ("fp32", "bf16"):
            for stage in (1, 2, 3):
                section = {"stage": stage, "offload_optimizer": offload}
                found.append((f"ZeRO {stage}, offload", precision, section))
        found += [(f"ZeRO {stage}, {FEW_BITS}", "bf16", {"stage": stage}) for stage in (1, 3)]
        if device == "cpu":  # DeepSpeed asks for instructions for it that not every CPU has
            found = [case for case in found if case[1] != "fp16"]
        return found[:1] if short else found  # type: ignore[return-value]
    half = [] if short or name.startswith("horovod") else ["bf16"]
    few_bits = [] if short else [(f"{name}, {FEW_BITS}", "fp32", None)]
    return [*((name, precision, None) for precision in ("fp32", *half)), *few_bits]


def main() -> None:
    """Print a result per case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    horovod = arguments.names[0].startswith("horovod")
    if "HOROVOD_RANK" not in os.environ and not horovod:
        for variable, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(variable, value)
    ranks = discover_ranks()
    connected: dict[Any, Communicator] = {}  # ways to connect that have been taken
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names:
            for title, precision, zero in cases(name, arguments.device, short=arguments.short):
                begin = time.perf_counter()
                case = {"kind": "engine", "case": f"{title}, {precision}, {ranks.world_size} rank(s)"}
                try:
                    config = _config(Path(folder), zero, params_of(title))
                    builder = load_builder(name)(
                        settings(
                            "auto" if zero is None and precision == "fp32" else precision,
                            config,
                            params_of(title),
                        ),
                        ranks.world_size,
                    )
                    if builder.connect not in connected:
                        connected[builder.connect] = builder.connect(ranks)
                    communicator = connected[builder.connect]
                    engine = builder.build(model(), communicator, ranks)
                    weights = trained(engine, communicator, precision, casts=zero is not None)
                    if ranks.rank == 0:
                        expected = by_hand(precision, engine.device, casts=zero is not None)
                        off = distance(weights, expected)
                        seconds = round(time.perf_counter() - begin, 2)
                        most = FEW_BITS_TOLERANCE if title.endswith(FEW_BITS) else TOLERANCE[precision]
                        say(**case, ok=off <= most, off=float(f"{off:.2g}"), seconds=seconds)
                except Exception as error:
                    traceback.print_exc()
                    say(**case, ok=False, error=f"{type(error).__name__}: {error}"[:500])
    for communicator in connected.values():
        communicator.close()
    end_process(0)


def _config(folder: Path, zero: dict[str, Any] | None, params: dict[str, Any]) -> str | None:
    if zero is None:
        return None
    path = folder / "deepspeed.json"
    section = {**zero, "reduce_bucket_size": 100_000}
    content = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "ARSG", "params": params},
        "zero_optimization": section,
        "fp16": {"enabled": False, "loss_scale": 128},
        "steps_per_print": 1_000_000,
    }
    path.write_text(json.dumps(content))
    return str(path)


if __name__ == "__main__":
    main()
