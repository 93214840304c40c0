"""Build the engine `ddp` for a training."""

from typing import Any

import torch
from torch import nn

from arsg_dist.ddp.engine import DDPEngine
from arsg_dist.engine import Communicator, Engine, LocalBuilder, Ranks, connect_torch


class DDPBuilder(LocalBuilder):
    """Build a `DDPEngine`."""

    @staticmethod
    def connect(ranks: Ranks) -> Communicator:
        """Make torch's process group; see `connect_torch`. Collective."""
        return connect_torch(ranks)

    def _engine(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        options: dict[str, Any],
    ) -> Engine:
        return DDPEngine(module, optimizer, communicator, **options)
