"""Training with the DeepSpeed configs that the repository ships, and the single process they have to equal."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist import ARSG
from arsg_dist.deepspeed import resolve_config
from arsg_dist.deepspeed.config.schedules import build_scheduler
from tests.support.launchers import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs/deepspeed").glob("*.json"))
UPDATES = 20
BATCH = 256
RECIPE = {
    "type": "ARSG",
    "params": {"lr": 0.001, "eps": 1e-8},
}  # for the configs that leave it to the program


def config_of(path: Path, world_size: int, scratch: Path) -> dict[str, Any]:
    """The config as a user has it; only the directory on a disk of this machine is another."""
    if path.name.startswith("zero"):
        return resolve_config(
            path,
            world_size=world_size,
            batch_size=BATCH,
            accumulation_steps=1,
            clip_grad_norm=0.0,
            optimizer=RECIPE,
        )
    config: dict[str, Any] = json.loads(path.read_text())
    assert config["train_batch_size"] == BATCH
    offload = config["zero_optimization"].get("offload_optimizer", {})
    if "nvme_path" in offload:
        offload["nvme_path"] = str(scratch)
    return config


def needs_nvme(path: Path) -> bool:
    """Whether the config keeps state on NVMe."""
    return '"nvme"' in path.read_text()


def build_model(path: Path) -> nn.Module:
    """On NVMe large enough to be swapped: DeepSpeed leaves less than 1 MiB on a rank in memory."""
    torch.manual_seed(1)
    size = 768 if needs_nvme(path) else 64
    return nn.Sequential(nn.Linear(13, size), nn.Tanh(), nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 3))


def batch() -> tuple[Tensor, Tensor]:
    """Inputs (256, 13) and targets (256, 3), the same in every update."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(BATCH, 13, generator=generator)
    return inputs, inputs[:, :3].sin() + 1


def loss_of(model: Any, part: slice, dtype: torch.dtype) -> Tensor:
    """Mean squared error of a part of the batch, in fp32."""
    inputs, targets = batch()
    return nn.functional.mse_loss(model(inputs[part].to(dtype)).float(), targets[part])


def losses_of_one_process(path: Path, config: dict[str, Any]) -> list[float]:
    """Before each update, in fp32 on the whole batch."""
    model = build_model(path)
    optimizer = ARSG(model.parameters(), **config["optimizer"]["params"], foreach=False, fused=False)
    scheduler = build_scheduler(config["scheduler"], optimizer) if "scheduler" in config else None
    losses = []
    for _ in range(UPDATES):
        optimizer.zero_grad()
        loss = loss_of(model, slice(None), torch.float32)
        losses.append(loss.item())
        loss.backward()
        if config["gradient_clipping"]:
            nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clipping"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return losses
