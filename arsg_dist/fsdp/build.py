"""Build the engine `fsdp` for a training."""

import torch
from torch import nn

from arsg_dist.engine import (
    Communicator,
    Engine,
    EngineBuilder,
    Ranks,
    TrainingSettings,
    connect_torch,
)
from arsg_dist.fsdp.engine import CAPABILITIES, FSDPEngine
from arsg_dist.fsdp.units import shard


class FSDPBuilder(EngineBuilder):
    """Build an `FSDPEngine`: the network sharded block by block, forward passes under autocast."""

    capabilities = CAPABILITIES

    def __init__(self, settings: TrainingSettings, world_size: int) -> None:
        if settings.precision == "fp16":
            raise ValueError(
                "precision: fp16 does not work with the engine fsdp, which has no loss scaling: use bf16, or the "
                "engine ddp"
            )
        self._settings = settings
        self.precision = "fp32" if settings.precision == "auto" else settings.precision

    @staticmethod
    def connect(ranks: Ranks) -> Communicator:
        """Make torch's process group; see `connect_torch`. Collective."""
        return connect_torch(ranks)

    def build(self, module: nn.Module, communicator: Communicator, ranks: Ranks) -> Engine:
        """Put the network on this rank's device, shard it, and make its optimizer."""
        settings = self._settings
        if torch.cuda.is_available():
            module = module.cuda()
        shard(
            module
        )  # shards of channels_last parameters do not exist; images may be in that layout all the same
        return FSDPEngine(
            module,
            settings.build_optimizer(settings.parameter_groups(module)),
            communicator,
            accumulation_steps=settings.accumulation_steps,
            clip_grad_norm=settings.clip_grad_norm,
            skip_nonfinite=settings.skip_nonfinite,
        )
