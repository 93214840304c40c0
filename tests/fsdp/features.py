"""A network with all that FSDP's units can stumble over, trained with every option of the engine on 2 × 2 ranks."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import Communicator, Engine, JobError, SingleProcessEngine, check_replicas
from arsg_dist.engine.dtensors import add_tensors, read_like
from arsg_dist.engine.state import EXTRA, key_of
from arsg_dist.fsdp import FSDPEngine, shard, units_of
from arsg_dist.imagenet.training.ema import WeightAverage
from arsg_dist.optim.state import local
from tests.support import toy

WIDTH, ACCUMULATION, DECAY = 12, 2, 0.75


class Layer(nn.Module):
    """A block: one part of it is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)
        self.spare = nn.Linear(WIDTH, 7)
        self.register_buffer("passes", torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.passes.add_(1.0)
        return inputs + self.second(self.first(self.norm(inputs)).tanh())


class Network(nn.Module):
    """Blocks between two layers; the last two share a weight, and the first has a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(17, WIDTH), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList(Layer() for _ in range(4))
        self.blocks[3].first.weight = self.blocks[2].first.weight
        self.blocks[0].second.weight.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.inlet(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.outlet(hidden)


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def optimizer_over(module: nn.Module) -> ARSG:
    return ARSG([p for p in module.parameters() if p.requires_grad], **toy.HYPERPARAMETERS)


def train(engine: Engine, average: WeightAverage, module: nn.Module, first: int, last: int) -> None:
    """Updates in two micro-batches; between them an evaluation of what is trained, at x and at θ."""
    size = toy.BATCH // engine.communicator.world_size // ACCUMULATION
    for update in range(first, last):
        inputs, targets = toy.batch(update)
        engine.module.train()
        for micro_batch in range(ACCUMULATION):
            begin = (engine.communicator.rank * ACCUMULATION + micro_batch) * size
            part = slice(begin, begin + size)
            engine.backward(toy.loss_of(engine.module(inputs[part]), targets[part]))
            engine.step()
        average.update(module)
        engine.module.eval()
        with torch.no_grad(), engine.base_iterate():
            engine.module(inputs)
        with torch.no_grad():
            engine.module(inputs)
            average.module(inputs)


def alone() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What one process gets: weights and their average."""
    module = network()
    average = WeightAverage(module, DECAY)
    engine = SingleProcessEngine(
        module, optimizer_over(module), clip_grad_norm=0.5, accumulation_steps=ACCUMULATION
    )
    train(engine, average, module, 0, toy.UPDATES)
    return dict(module.state_dict()), dict(average.module.state_dict())


def built(
    communicator: Communicator, *, replicas: int, keep: bool = False, **options: Any
) -> tuple[FSDPEngine, WeightAverage, nn.Module]:
    module = network()
    average = WeightAverage(module, DECAY)
    mesh = init_device_mesh(
        "cpu", (replicas, communicator.world_size // replicas), mesh_dim_names=("replica", "shard")
    )
    shard(module, mesh if replicas > 1 else mesh["shard"], reshard_after_forward=not keep, **options)
    engine = FSDPEngine(
        module,
        optimizer_over(module),
        communicator,
        accumulation_steps=ACCUMULATION,
        clip_grad_norm=0.5,
        keep_gathered=keep,
        sharding=options,
    )
    engine.hold(average.module)
    return engine, average, module


def resumed(engine: FSDPEngine, average: WeightAverage, communicator: Communicator, directory: Path) -> Any:
    """Another engine that goes on from what this one saves."""
    state = engine.state()
    own = {key_of(EXTRA, name): tensor for name, tensor in average.state_dict().items()}
    add_tensors(state, own, communicator.rank, communicator.world_size)
    path = save_run(CheckpointStore(directory, communicator), 1, state, {}, communicator)
    other, its_average, module = built(communicator, replicas=1)
    saved = SavedRun(path)
    other.load_state(saved)
    its_average.load_state_dict(
        {name: read_like(saved, EXTRA, name, like) for name, like in its_average.state_dict().items()}
    )
    # Buffers are each rank's own, which the program saves beside.
    for buffer, saved_buffer in zip(its_average.module.buffers(), average.module.buffers(), strict=True):
        buffer.copy_(saved_buffer)
    return other, its_average, module


def refusal(engine: FSDPEngine) -> str:
    try:
        check_replicas(engine.communicator, engine.replicated_tensors(), engine.shards_of_ranks)
    except JobError as error:
        return str(error)
    return ""


class Collectives(TorchDispatchMode):
    """Counts the operations of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("c10d"):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def results(communicator: Communicator, directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {
        "shards": {"replicas": 1},
        "kept": {"replicas": 1, "keep": True},
        "replicas": {"replicas": 2, "keep": True},
        "offloaded": {"replicas": 2, "offload_policy": CPUOffloadPolicy(pin_memory=False)},
    }
    for name, options in cases.items():
        engine, average, module = built(communicator, **options)
        train(engine, average, module, 0, 3)
        if name == "replicas":
            other = resumed(engine, average, communicator, directory / "features")
            train(*other, 3, toy.UPDATES)
            found["gone on"] = other[0].whole_weights(), other[0].weights_of(other[1].module)
            found["replicas agree"] = refusal(engine)
        train(engine, average, module, 3, toy.UPDATES)
        found[name] = engine.whole_weights(), engine.weights_of(average.module)
        found[f"{name}: held"] = communicator.all_gather_object(
            sum(local(tensor).numel() for tensor in average.module.parameters())
        )
        if name == "replicas" and communicator.rank == 3:
            next(engine.local_parameters()).detach().view(-1)[0] += 1e-6
        found[f"{name}: differs"] = refusal(engine) if name == "replicas" else ""
    for keep in (False, True):
        engine, average, module = built(communicator, replicas=1, keep=keep)
        for update in range(2):  # buffers are made in the first
            counted = Collectives()
            with counted:
                for _ in range(ACCUMULATION):
                    engine.backward(engine.module(toy.batch(update)[0]).sum())
                    engine.step()
        found[f"sent, kept {keep}"] = {
            kind: sum(number for operation, number in counted.counts.items() if kind in operation)
            for kind in ("allgather", "reduce_scatter")
        }
    found["units"] = [name for name, _ in units_of(network())]
    return found
