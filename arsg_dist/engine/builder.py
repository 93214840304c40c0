"""Build an engine for a training that does not know which."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from arsg_dist.engine.base import Capabilities, Engine
from arsg_dist.engine.communicator import Communicator
from arsg_dist.engine.ranks import Ranks
from arsg_dist.engine.registry import ENGINES


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Say what a training asks of its engine.

    Attributes:
        batch_size: images (or other samples) per update, over all ranks.
        accumulation_steps: micro-batches per update and rank.
        clip_grad_norm: the averaged gradient is scaled down to this norm if it is larger; 0 for never.
        precision: "fp32", "bf16" or "fp16"; "auto" leaves it to the engine's own config, else fp32.
        skip_nonfinite: leave out updates whose gradient is not finite.
        channels_last: memory layout of the network, where the engine can train in it.
        optimizer_type: name of the optimizer, see `arsg_dist.optim.by_name`.
        optimizer_params: its settings.
        parameter_groups: makes the optimizer's parameter groups from the network.
        build_optimizer: makes the optimizer from them.
        config_file: path of the engine's own config, for engines that have one.
        engine_options: of this engine alone, by the names of its builder's `options`.
    """

    batch_size: int
    accumulation_steps: int = 1
    clip_grad_norm: float = 0.0
    precision: str = "auto"
    skip_nonfinite: bool = False
    channels_last: bool = False
    optimizer_type: str
    optimizer_params: dict[str, Any]
    parameter_groups: Callable[[nn.Module], list[dict[str, Any]]]
    build_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    config_file: str | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)


class EngineBuilder(ABC):
    """Check a training's settings against an engine, and build it later.

    Args:
        settings: of the training.
        world_size: ranks of the job.

    Raises:
        ValueError: the engine cannot do what they ask for, or its config file says something else.

    Attributes:
        capabilities: of the engine that will be built.
        precision: of autocast around forward passes: "fp32" for none, and for an engine that casts the network itself.
        options: name → values of what `TrainingSettings.engine_options` may have.
    """

    capabilities: Capabilities
    precision: str
    options: ClassVar[Mapping[str, tuple[bool | str, ...]]] = {}

    @abstractmethod
    def __init__(self, settings: TrainingSettings, world_size: int) -> None: ...

    @classmethod
    def check_options(cls, name: str, given: Mapping[str, Any]) -> None:
        """Refuse options that the engine does not have.

        Args:
            name: of the engine.
            given: `TrainingSettings.engine_options`.

        Raises:
            ValueError: one is not known, or has another value than it may have.
        """
        for option, value in given.items():
            if option not in cls.options:
                known = f"it has {', '.join(cls.options)}" if cls.options else "it has none"
                raise ValueError(f"engine_options.{option} is no option of the engine {name}: {known}")
            allowed = cls.options[option]
            if not any(type(value) is type(choice) and value == choice for choice in allowed):
                shown = ", ".join(str(choice).lower() for choice in allowed)
                raise ValueError(f"engine_options.{option} must be one of {shown}, not {value!r}")

    @staticmethod
    def units(module: nn.Module) -> list[str]:
        """Name the parts of a network that ranks gather one by one; none where no such parts are known beforehand."""
        return []

    def check_network(self, module: nn.Module) -> None:  # noqa: B027
        """Refuse a network that the engine is not for.

        Raises:
            ValueError: it cannot be distributed as the settings ask.
        """

    @staticmethod
    def compile(module: nn.Module) -> None:
        """Have a network's passes compiled when they are first run; to be called before `build`."""
        module.compile()

    def numeric_settings(self) -> dict[str, Any]:
        """Return what the engine computes with, beside the rest of the training's settings; nothing that only rounds.

        "precision" is that of forward and backward passes, whoever decided it; settings of this engine alone have its
        name in front ("deepspeed.prescale_gradients").
        """
        return {"precision": self.precision}

    @staticmethod
    @abstractmethod
    def connect(ranks: Ranks) -> Communicator:
        """Join this process to the job. Collective.

        Raises:
            ValueError: the job came up with another number of ranks than the launcher announced.
        """

    @abstractmethod
    def build(self, module: nn.Module, communicator: Communicator, ranks: Ranks) -> Engine:
        """Put a network on this rank's device, under the engine. Collective.

        Args:
            module: the network, the same on every rank or to be made so by the engine.
            communicator: from `connect`.
            ranks: of this process.
        """


def load_builder(name: str) -> type[EngineBuilder]:
    """Import the builder of an engine.

    Args:
        name: of `ENGINES`.

    Raises:
        ImportError: the engine is not installed; the message says how to install it.
    """
    module, _, attribute = ENGINES[name].builder.partition(":")
    builder: type[EngineBuilder] = getattr(importlib.import_module(module), attribute)
    return builder
