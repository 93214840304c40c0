"""A small saved run for the tests of the format."""

from pathlib import Path

import torch
from torch import nn

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, save_run
from arsg_dist.checkpoint.writer import write_manifest, write_part
from arsg_dist.engine import EngineState, SingleProcessCommunicator, SingleProcessEngine
from arsg_dist.engine.replicated_state import replicated_state
from arsg_dist.optim.hyperparameters import Preconditioner


class Tied(nn.Module):
    """Two names for one parameter, a channels_last convolution, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 3)
        self.conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        images = inputs.sum(1).view(-1, 1, 1, 1).expand(-1, 4, 3, 3)
        return self.last(self.first(inputs)).mean() + self.norm(self.conv(images)).abs().mean()


def engine(seed: int = 0, preconditioner: Preconditioner = "amsgrad") -> SingleProcessEngine:
    model = Tied()
    torch.manual_seed(seed)
    made = SingleProcessEngine(
        model, ARSG(model.parameters(), lr=0.01, eps=1e-3, mu=0.1, preconditioner=preconditioner)
    )
    for _ in range(2):
        made.backward(model(torch.randn(5, 3)))
        made.step()
    return made


def saved(directory: Path, seed: int = 0) -> Path:
    """A checkpoint that one rank wrote."""
    made, communicator = engine(seed), SingleProcessCommunicator()
    return save_run(CheckpointStore(directory, communicator), 1, made.state(), {"update": 2}, communicator)


def saved_by(directory: Path, world_size: int, made: SingleProcessEngine) -> Path:
    """What so many ranks with the same content would write."""
    directory.mkdir(parents=True)
    states: list[EngineState] = [
        replicated_state("single", made.module, made.optimizer, rank, world_size)
        for rank in range(world_size)
    ]
    for rank, state in enumerate(states):
        write_part(directory, rank, state)
    write_manifest(directory, world_size, states[0], {"update": 2})
    return directory
