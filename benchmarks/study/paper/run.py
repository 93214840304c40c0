"""One run: a task, an optimizer, a seed; the result is one JSON-lines file with its curve."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from arsg_dist import ARSG, ObservationBoost, theory
from arsg_dist.engine import Engine, SingleProcessEngine
from benchmarks.common.machine import device_name
from benchmarks.study.paper.data import Images
from benchmarks.study.paper.optimizers import build, paper_settings
from benchmarks.study.paper.tasks import TASKS, Task, augmented


@dataclass(frozen=True)
class Run:
    """What is run. Two equal ones give the same curve on the same machine.

    Attributes:
        task: name in `TASKS`.
        optimizer: name in `optimizers.NAMES`, at the paper's settings.
        seed: of initial weights, order and augmentation.
        epochs: passes; None for the protocol's. Decay of lr and boost keep their share of the run.
        train_images: how many of the training images; None for all.
        val_images: likewise.
        batch_size: images per update; None for the protocol's.
        lr_scaling: lr × (batch_size / protocol's) to the power of 0 ("none"), 1/2 ("sqrt") or 1 ("linear").
        settings: replace the paper's (lr, beta1, mu, ...). `boost`: "observation" (ARSGB's default), "lr" (the same
            cut of lr, μ stays) or "none". `network`: dtype of the parameters, on one process.
        engine: "single", "zero2" or "horovod-sharded".
        ranks: of the job; a single process divides each batch into as many micro-batches.
        theta: validate at ARSG's base iterate too.
    """

    task: str
    optimizer: str
    seed: int
    epochs: int | None = None
    train_images: int | None = None
    val_images: int | None = None
    batch_size: int | None = None
    lr_scaling: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    engine: str = "single"
    ranks: int = 1
    theta: bool = False

    def file_name(self, device: str) -> str:
        """Distinct for different runs, and for another kind of device."""
        content = json.dumps([asdict(self), device], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:10]
        return f"{self.task}-{self.optimizer}-{self.seed}-{digest}.jsonl"

    @property
    def batch(self) -> int:
        """Images per update."""
        return self.batch_size or TASKS[self.task].batch_size

    @property
    def passes(self) -> int:
        """Epochs."""
        return self.epochs or TASKS[self.task].epochs

    def optimizer_settings(self) -> dict[str, Any]:
        """The paper's, with lr scaled to the batch, and what replaces them."""
        task = TASKS[self.task]
        settings = paper_settings(task.settings, self.optimizer) | self.settings
        settings.setdefault("boost", "observation" if self.optimizer == "ARSGB" else "none")
        power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.lr_scaling]
        settings["lr"] = settings["lr"] * (self.batch / task.batch_size) ** power
        return settings


def single_process_engine(module: nn.Module, run: Run) -> SingleProcessEngine:
    """Everything in this process, in as many micro-batches as the run has ranks."""
    settings = run.optimizer_settings()
    settings.pop("boost")
    network = getattr(torch, settings.pop("network", "float32"))
    optimizer = build(run.optimizer, module.to(network).parameters(), settings, TASKS[run.task].weight_decay)
    engine = SingleProcessEngine(module, optimizer, accumulation_steps=run.ranks)
    engine.input_dtype = network
    return engine


def train(
    run: Run,
    images: Images,
    device: torch.device,
    make_engine: Callable[[nn.Module, Run], Engine] = single_process_engine,
) -> Iterator[dict[str, Any]]:
    """Trains, and yields one record per epoch.

    Args:
        run: what.
        images: on `device`, all of them; the run takes its share.
        device: to train on.
        make_engine: of a module on that device.

    Yields:
        epoch (from 1), batch_losses (mean loss of each batch of the epoch, over all ranks), val_loss, val_accuracy,
        seconds (since the start, validation included); with `theta` also val_loss_theta and val_accuracy_theta. The
        last record has "diverged": true if a loss was not finite; the run then ends.

    Raises:
        ValueError: more images per batch than there are, or a batch that the ranks cannot share.
    """
    task = TASKS[run.task]
    images = images.limited(run.train_images, run.val_images)
    updates = len(images.train_images) // run.batch
    if updates == 0 or run.batch % run.ranks:
        raise ValueError(f"{run}: {len(images.train_images)} images cannot be shared out")
    torch.manual_seed(run.seed)
    engine = make_engine(task.model().to(device), run)
    after_update, after_epoch = _schedules(engine.optimizer, run, task, updates)
    start = time.perf_counter()
    for epoch in range(run.passes):
        order = torch.randperm(
            len(images.train_images), generator=torch.Generator().manual_seed(1_000 * run.seed + epoch)
        )
        generator = torch.Generator().manual_seed(1_000_000 + 1_000 * run.seed + epoch)
        engine.module.train()
        losses = []
        for update in range(updates):
            chosen = order[update * run.batch : (update + 1) * run.batch].to(device)
            pixels = images.train_images[chosen]
            if task.crop:
                pixels = augmented(pixels, task.crop, generator)
            losses.append(_update(engine, images.normalised(pixels), images.train_labels[chosen]))
            after_update(epoch * updates + update + 1)
        record = {"epoch": epoch + 1, "batch_losses": _over_ranks(engine, losses)}
        record |= _validation(engine, images)
        if run.theta and isinstance(engine.optimizer, ARSG):
            with engine.base_iterate():
                record |= {f"{key}_theta": value for key, value in _validation(engine, images).items()}
        record["seconds"] = time.perf_counter() - start
        if not all(math.isfinite(loss) for loss in record["batch_losses"]):
            yield record | {"diverged": True}
            return
        yield record
        after_epoch()


def _update(engine: Engine, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One update from a global batch; returns this rank's mean loss, without waiting for the device."""
    world, rank = engine.communicator.world_size, engine.communicator.rank
    size = len(pixels) // (world * engine.accumulation_steps)
    total = torch.zeros((), device=pixels.device)
    for step in range(engine.accumulation_steps):
        part = slice((step * world + rank) * size, (step * world + rank + 1) * size)
        logits = engine.module(pixels[part].to(engine.input_dtype)).float()
        loss = functional.cross_entropy(logits, labels[part])
        engine.backward(loss)
        engine.step()
        total += loss.detach() / engine.accumulation_steps
    return total


def _over_ranks(engine: Engine, losses: list[torch.Tensor]) -> list[float]:
    gathered = engine.communicator.all_gather_object(torch.stack(losses).double().cpu())
    return [round(loss, 6) for loss in torch.stack(gathered).mean(0).tolist()]


@torch.no_grad()
def _validation(engine: Engine, images: Images) -> dict[str, float]:
    engine.module.eval()
    loss, right = torch.zeros((), device=images.val_images.device), 0
    for start in range(0, len(images.val_images), 1000):
        pixels = images.normalised(images.val_images[start : start + 1000])
        logits = engine.module(pixels.to(engine.input_dtype)).float()
        labels = images.val_labels[start : start + 1000]
        loss += functional.cross_entropy(logits, labels, reduction="sum")
        right = right + (logits.argmax(1) == labels).sum()
    count = len(images.val_images)
    return {"val_loss": round(float(loss) / count, 6), "val_accuracy": round(int(right) / count, 6)}


def _schedules(
    optimizer: torch.optim.Optimizer, run: Run, task: Task, updates: int
) -> tuple[Callable[[int], None], Callable[[], None]]:
    """What to call after every update (with its number, from 1) and after every epoch."""
    decay_at = round(task.decay_at * run.passes * updates) if task.decay_at else -1
    boost_after = max(1, round(task.boost_after * run.passes / task.epochs))
    settings = run.optimizer_settings()
    boost = ObservationBoost(optimizer, [boost_after]) if settings["boost"] == "observation" else None
    epochs = 0

    def scale(factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def after_update(update: int) -> None:
        if update == decay_at:
            scale(0.1)

    def after_epoch() -> None:
        nonlocal epochs
        epochs += 1
        if boost is not None:
            boost.step()
        elif settings["boost"] == "lr" and epochs == boost_after:
            scale(theory.boost_ratio(settings["beta1"], settings["mu"], 2 * settings["mu"]))

    return after_update, after_epoch


def write(run: Run, records: Iterator[dict[str, Any]], device: torch.device, path: Path) -> None:
    """Writes a curve; the file appears under its name when it is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        head = {"run": asdict(run), "device": device_name(device.type), "torch": torch.__version__}
        file.write(json.dumps(head) + "\n")
        for record in records:
            file.write(json.dumps(record) + "\n")
    partial.rename(path)
