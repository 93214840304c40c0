"""Build the engine `fsdp` for a training."""

from typing import Any

import torch
from torch import nn

from arsg_dist.engine import Communicator, LocalBuilder, TrainingSettings, connect_torch
from arsg_dist.fsdp.engine import CAPABILITIES, FSDPEngine
from arsg_dist.fsdp.units import shard


class FSDPBuilder(LocalBuilder):
    """Build an `FSDPEngine`: the network sharded block by block, forward passes under autocast."""

    capabilities = CAPABILITIES
    connect = staticmethod(connect_torch)
    _channels_last = (
        False  # there are no shards of such parameters; images may be in that layout all the same
    )

    def __init__(self, settings: TrainingSettings, world_size: int) -> None:
        if settings.precision == "fp16":
            raise ValueError(
                "precision: fp16 does not work with the engine fsdp, which has no loss scaling: use bf16, or the "
                "engine ddp"
            )
        super().__init__(settings, world_size)

    def _distribute(self, module: nn.Module) -> None:
        shard(module)

    @staticmethod
    def _engine(
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        *,
        loss_scaling: bool,
        **options: Any,
    ) -> FSDPEngine:
        assert not loss_scaling, "fp16 was refused"
        return FSDPEngine(module, optimizer, communicator, **options)
