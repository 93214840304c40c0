"""Hold what a training run is made of, on one rank."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import nn

from arsg_dist.engine import Communicator, Engine
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.data.dataset import Batch
from arsg_dist.imagenet.data.sampler import TrainingSampler
from arsg_dist.imagenet.data.transforms import BatchMixing
from arsg_dist.imagenet.output.states import Resume
from arsg_dist.imagenet.signals import StopRequest
from arsg_dist.imagenet.training.ema import WeightAverage
from arsg_dist.imagenet.training.evaluation import network_inputs
from arsg_dist.imagenet.training.optimization import Schedules


@dataclass(frozen=True)
class Start:
    """One start of a run: what the recipe does not say.

    Attributes:
        engine: what distributes the training, a name of `arsg_dist.engine.ENGINES`.
        output: the run's directory.
        resume: continue the run in `output`; "auto": continue it, or start where nothing complete is there.
        skip_damaged: with `resume`: continue from the newest checkpoint that is not damaged.
        allowed: kinds of `identity.ALLOWED` in which a checkpoint may differ from this start.
        deepspeed_config: path of a DeepSpeed JSON config, for the engine that has one.
        max_updates: end after this many weight updates of the whole run, inside an epoch or not, without validation of
            an epoch that is not finished, and with a checkpoint if the run has none yet; None for the recipe's end.
    """

    engine: str
    output: Path
    resume: Resume = False
    deepspeed_config: str | None = None
    max_updates: int | None = None
    skip_damaged: bool = False
    allowed: frozenset[str] = frozenset()


class Stateful(Protocol):
    """A part with a state of its own, the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors alone, or plain values alone."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, perhaps of somebody else's run.

        Raises:
            ValueError: it is no state of this part.
        """


SWITCHES: Final = {"ema": "ema_decay"}
"""Names in `RunParts.stateful` of what a recipe may leave out, and the settings that do."""


@dataclass(frozen=True)
class RunParts:
    """The objects of one training.

    Attributes:
        config: of the run.
        engine: over `model`.
        model: the network as it was built; `engine.module` is what to call.
        average: of the weights, on the engine's device; None where the recipe has none.
        schedules: of the engine's optimizer.
        autocast: context of forward passes.
        mixing: of training batches.
        train_sampler: order of the training images.
        train_loader: batches in that order.
        val_loader: this rank's share of the validation split.
        classes: names, in the order of the labels.
        notes: on the data, for the user.
        identity: what makes the run's checkpoints its own, of `identity_of`.
        stop: signals to end the run.
    """

    config: TrainConfig
    engine: Engine
    model: nn.Module
    average: WeightAverage | None
    schedules: Schedules
    autocast: AbstractContextManager[None]
    mixing: BatchMixing
    train_sampler: TrainingSampler
    train_loader: Iterable[Batch]
    val_loader: Iterable[Batch]
    classes: list[str]
    notes: list[str]
    identity: dict[str, Any]
    stop: StopRequest

    @property
    def stateful(self) -> dict[str, Stateful | None]:
        """What a checkpoint holds beside the engine, by name; None: switched off."""
        return {"schedules": self.schedules, "ema": self.average}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks whose buffers differ between ranks, by their names in checkpoints."""
        return {"model": self.model, **({"ema": self.average.module} if self.average else {})}

    @property
    def communicator(self) -> Communicator:
        """Of all ranks."""
        return self.engine.communicator

    @property
    def leader(self) -> bool:
        """Whether this is rank 0, which shows and writes what all ranks agree on."""
        return self.communicator.rank == 0

    def forward(self, module: nn.Module, images: torch.Tensor) -> Any:
        """Compute logits, shape (batch, classes), in the precision of the run; see `weighted_logits`."""
        with self.autocast:
            return module(images)

    def to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Move a batch to the device, its images as the engine's module takes them."""
        return network_inputs(
            batch, self.engine.device, self.engine.input_dtype, channels_last=self.config.channels_last
        )
