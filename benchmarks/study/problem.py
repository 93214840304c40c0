"""What a task gives to an optimizer: a module, batch losses and a validation loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn


class Problem(ABC):
    """One training, made from a seed that fixes the initial weights and every batch.

    Attributes:
        module: what is trained.
    """

    module: nn.Module

    @abstractmethod
    def batch_loss(self, update: int) -> Tensor:
        """Return the loss of a batch.

        Args:
            update: number of the update, from 0; the same one gives the same batch.
        """

    @abstractmethod
    def validation_loss(self, full: bool) -> float:
        """Return the loss on data that is not trained on, or log10 of the distance to a known optimum.

        Args:
            full: on all that is kept for the end of a run; otherwise on a part, for curves.
        """

    @abstractmethod
    def training_loss(self) -> float:
        """Return the loss on a fixed part of what is trained on."""

    def matrices(self) -> list[nn.Parameter]:
        """Return the hidden matrices, which Muon steps; it leaves the others to AdamW. Default: those of `blocks`."""
        blocks = getattr(self.module, "blocks", None)
        return [one for one in blocks.parameters() if one.ndim == 2] if isinstance(blocks, nn.Module) else []


@dataclass(frozen=True)
class Task:
    """What is learned, for how long.

    Attributes:
        name: of the task.
        title: for people.
        short: the same for the head of a column.
        make: a problem from a seed and the directory of data sets.
        updates: of a run.
        lr: centre of the learning rate's box, per family of optimizers ("adam", "lion", "muon", "sgd"); a family that
            is left out cannot train this task.
        clip: largest norm of the gradient, or None.
        settings_of: the task whose winners are taken, untuned; None: 30 trials of its own.
        optimizers: names, the most wanted first; empty for all that can.
        exact: the optimum is known, losses are log10 of the distance to it.
        runoff: the three best trials run with three other seeds, and the best of these is the winner.
        table: where its column stands: with the "networks", the "others", or with the same network in another "batch".
    """

    name: str
    title: str
    short: str
    make: Callable[[int, Path | None], Problem]
    updates: int
    lr: dict[str, float] = field(default_factory=dict)
    clip: float | None = None
    settings_of: str | None = None
    optimizers: tuple[str, ...] = ()
    exact: bool = False
    runoff: bool = False
    table: str = "networks"
