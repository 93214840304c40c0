"""Build DeepSpeed's engine, its config completed with a training's settings."""

import warnings
from typing import Any, Final

from torch import nn

from arsg_dist.deepspeed.config.resolve import resolve_config
from arsg_dist.deepspeed.config.side_effects import side_effects
from arsg_dist.deepspeed.engine import DeepSpeedEngine, capabilities_at, connect
from arsg_dist.engine import Communicator, Engine, EngineBuilder, Ranks, TrainingSettings
from arsg_dist.optim.by_name import NAMES

_NUMERIC: Final = (
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "data_types",
    "torch_autocast",
)
_NUMERIC_OF_ZERO: Final = (
    "zero_quantized_weights",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
)


class DeepSpeedBuilder(EngineBuilder):
    """Build a `DeepSpeedEngine`.

    Attributes:
        config: the complete DeepSpeed config.
    """

    precision = "fp32"  # DeepSpeed casts the network itself, as its config says

    def __init__(self, settings: TrainingSettings, world_size: int) -> None:
        assert settings.config_file is not None
        self._settings = settings
        self.config = resolve_config(
            settings.config_file,
            world_size=world_size,
            batch_size=settings.batch_size,
            accumulation_steps=settings.accumulation_steps,
            clip_grad_norm=settings.clip_grad_norm,
            optimizer={"type": settings.optimizer_type, "params": settings.optimizer_params},
        )
        settle_precision(self.config, settings.precision, settings.config_file)
        stage = (self.config.get("zero_optimization") or {}).get("stage", 0)
        half = _precision_on(self.config)
        if not stage and settings.optimizer_type not in NAMES and half:
            raise ValueError(
                f"optimizer.type {settings.optimizer_type} does not work with ZeRO stage 0 in {half}, where "
                "DeepSpeed makes an update before the first batch: use stage 1, 2 or 3, or fp32"
            )
        self.capabilities = capabilities_at(stage)

    def numeric_settings(self) -> dict[str, Any]:
        """Return the precision that the config decides, and what else in it changes gradients or weights."""
        precision = (_precision_on(self.config) or "fp32").replace("bfloat16", "bf16")
        zero = self.config.get("zero_optimization") or {}
        own = {name: self.config.get(name) for name in _NUMERIC}
        own |= {f"zero_optimization.{name}": zero.get(name) for name in _NUMERIC_OF_ZERO}
        return {"precision": precision, **{f"deepspeed.{name}": value for name, value in own.items()}}

    @staticmethod
    def connect(ranks: Ranks) -> Communicator:
        """Initialise DeepSpeed's communication; see `engine.connect`. Collective."""
        return connect(ranks)

    def build(self, module: nn.Module, communicator: Communicator, ranks: Ranks) -> Engine:
        """Hand the network to `deepspeed.initialize`; warn of side effects. Collective."""
        settings = self._settings
        for effect in side_effects(self.config) if communicator.rank == 0 else ():
            warnings.warn(f"besides training, the DeepSpeed config has an effect: {effect}", stacklevel=2)
        return DeepSpeedEngine(
            module,
            self.config,
            communicator,
            parameter_groups=settings.parameter_groups(module),
            # Ours are left to their names in the config, as in any script with DeepSpeed.
            optimizer=None if settings.optimizer_type in NAMES else settings.build_optimizer,
            skip_nonfinite=settings.skip_nonfinite,
        )


def settle_precision(config: dict[str, Any], precision: str, path: str) -> None:
    """Write a training's precision into a DeepSpeed config that leaves it open.

    Args:
        config: to be completed in place.
        precision: "auto", "fp32", "bf16" or "fp16".
        path: of the config, for messages.

    Raises:
        ValueError: the two contradict each other.
    """
    on = _precision_on(config)
    given = on.replace("bfloat16", "bf16") if on else None
    if precision == "auto":
        return
    if given is None:
        if precision != "fp32":
            config[precision] = {**(config.get(precision) or {}), "enabled": True}
    elif given != precision:
        raise ValueError(
            f"{path} has {on} enabled but this run has precision: {precision}: "
            "make them equal, or write precision: auto in the recipe"
        )


def _precision_on(config: dict[str, Any]) -> str | None:
    """Name the section of a DeepSpeed config that turns fp32 off."""
    for name in ("bf16", "bfloat16", "fp16", "torch_autocast"):
        if (config.get(name) or {}).get("enabled", False) is True:
            return name
    return None
