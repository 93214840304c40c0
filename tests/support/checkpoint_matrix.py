"""A small training that every engine makes, saved and loaded by each of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import Engine, SingleProcessEngine, TrainingSettings, discover_ranks, load_builder
from arsg_dist.engine.state import BUFFER, PARAMETER
from tests.support import toy
from tests.support.engines import ENGINES

SAVE_AFTER, UPDATES = 3, 6
STAGES = ("zero0", "zero1", "zero2", "zero3")
FAMILIES: dict[str, tuple[str, ...]] = {
    "single": ("single",),
    "torchrun": (
        *(name for name, started in ENGINES.items() if started.launcher == "torchrun"),
        "ddp-divided",
    ),
    "horovod": tuple(name for name, started in ENGINES.items() if started.launcher == "horovodrun"),
    "deepspeed": STAGES,
}
LAUNCHERS = {
    "single": "warm alone",
    "torchrun": "warm torchrun",
    "horovod": "warm horovodrun",
    "deepspeed": "warm deepspeed",
}
SIZES = {"single": (1,), "torchrun": (1, 2, 3), "horovod": (1, 2, 3), "deepspeed": (1, 2, 3)}
FROZEN = "2.bias"


class Counting(nn.Module):
    """Has a buffer that changes with every forward pass in training, on every rank alike."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.tensor([0.5, 0.25]))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.passes.mul_(1.125)
        return inputs


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(17, 31), nn.Tanh(), nn.Linear(31, 13), Counting(), nn.Tanh(), nn.Linear(13, 5)
    )
    model.get_parameter(FROZEN).requires_grad_(False)
    return model


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: the second has a step count and slow weights besides the moments."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in named if "weight" in name]},
        {
            "params": [p for name, p in named if "weight" not in name],
            "lr": 0.03,
            "mu": 0.2,
            "weight_decay": 0.0,
            "lookahead_k": 2,
        },
    ]


def sources() -> Iterator[tuple[str, int]]:
    """All that save: name of the engine, ranks."""
    for family, names in FAMILIES.items():
        for ranks in SIZES[family]:
            yield from ((name, ranks) for name in names)


def sources_for(name: str, ranks: int, *, every: bool) -> list[tuple[str, int]]:
    """What an engine on a number of ranks loads: all, or of each engine one number of ranks.

    Each engine loads from each engine on all its numbers of ranks, and each number of ranks from each.
    """
    if every:
        return list(sources())
    engines = [engine for names in FAMILIES.values() for engine in names]
    sizes = {engine: SIZES[family] for family, names in FAMILIES.items() for engine in names}
    turn = engines.index(name) + ranks
    return [
        (engine, sizes[engine][(turn + number) % len(sizes[engine])]) for number, engine in enumerate(engines)
    ]


def build_engine(name: str, communicator: Any, *, half: bool = False) -> Engine:
    model = build_model()
    if name.startswith("zero"):
        from arsg_dist.deepspeed import DeepSpeedEngine

        config = {
            "train_batch_size": toy.BATCH,
            "train_micro_batch_size_per_gpu": toy.BATCH // communicator.world_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "ARSG", "params": toy.HYPERPARAMETERS},
            "zero_optimization": {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            **({"bf16": {"enabled": True}} if half else {}),
        }
        return DeepSpeedEngine(model, config, communicator, parameter_groups=groups_of(model))
    if half:  # as DeepSpeed's bf16, which leaves buffers alone
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return engine_around(
        name, model, groups_of, lambda groups: ARSG(groups, **toy.HYPERPARAMETERS), communicator
    )


def engine_around(
    name: str,
    model: nn.Module,
    groups_of: Callable[[nn.Module], list[dict[str, Any]]],
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    communicator: Any,
) -> Engine:
    """An engine of `FAMILIES` that takes a model and an optimizer, made over the groups of what is distributed."""
    if name == "fsdp":
        from arsg_dist import fsdp

        fsdp.shard(model)
        return fsdp.FSDPEngine(model, make(groups_of(model)), communicator)
    if name == "ddp-divided":
        from arsg_dist.ddp import DDPEngine, Shards

        shards = Shards(groups_of(model))
        return DDPEngine(model, make(shards.groups), communicator, shards=shards)
    optimizer = make(groups_of(model))
    if name == "single":
        return SingleProcessEngine(model, optimizer)
    if name == "ddp":
        from arsg_dist.ddp import DDPEngine

        return DDPEngine(model, optimizer, communicator)
    from arsg_dist import horovod

    if name == "horovod":
        return horovod.HorovodEngine(model, optimizer, communicator)
    if name == "horovod-sharded":
        return horovod.HorovodShardedEngine(model, optimizer, communicator, bucket_mb=0.001)
    wanted = TrainingSettings(
        batch_size=toy.BATCH,
        optimizer_type="ARSG",
        optimizer_params=toy.HYPERPARAMETERS,
        parameter_groups=lambda _: [],
        build_optimizer=lambda _: optimizer,
    )
    return load_builder(name)(wanted, communicator.world_size).build(model, communicator, discover_ranks())


def train(engine: Engine, first: int, last: int) -> list[float]:
    """Updates from `first` up to `last`; the mean losses over all ranks."""
    losses = []
    size = toy.BATCH // engine.communicator.world_size
    part = slice(engine.communicator.rank * size, (engine.communicator.rank + 1) * size)
    dtype = next(iter(engine.module.parameters())).dtype
    engine.module.train()
    for update in range(first, last):
        inputs, targets = (tensor[part].to(dtype) for tensor in toy.batch(update))
        loss = toy.loss_of(engine.module(inputs), targets)
        engine.backward(loss)
        engine.step()
        for group in engine.optimizer.param_groups:
            group["lr"] *= 0.875  # what a schedule does
        total = engine.communicator.all_reduce_sum(loss.detach().double())
        losses.append(float(total) / engine.communicator.world_size)
    return losses


def save(engine: Engine, directory: Path, progress: dict[str, Any], *, wait: bool = True) -> Path:
    store = CheckpointStore(directory, engine.communicator)
    path = save_run(store, 1, engine.state(), progress, engine.communicator, wait=wait)
    store.finish()
    return path


def checkpoint(directory: Path, name: str, ranks: int) -> Path:
    """Where `save` puts it."""
    return directory / f"{name}-{ranks}" / "step-000000001"


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor, and everything else, of a checkpoint."""
    saved = SavedRun(path)
    tensors = {key: saved.whole(*key.split(":", 1)) for key in saved.manifest.tensors}
    others = {
        "groups": {name: saved.groups[index] for name, index in (saved.group_of or {}).items()},
        "numbers": {
            name: {entry: saved.number(name, entry) for entry in entries}
            for name, entries in saved.manifest.numbers.items()
        },
        "progress": saved.progress,
    }
    return tensors, others


def whole_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers, by name."""
    return {
        key.split(":", 1)[1]: tensor
        for key, tensor in tensors.items()
        if key.split(":", 1)[0] in (PARAMETER, BUFFER)
    }
