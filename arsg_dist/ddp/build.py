"""Build the engine `ddp` for a training."""

from typing import Any

import torch
from torch import nn

from arsg_dist.ddp.engine import DDPEngine, connect
from arsg_dist.engine import Communicator, Engine, LocalBuilder, Ranks


class DDPBuilder(LocalBuilder):
    """Build a `DDPEngine`."""

    @staticmethod
    def connect(ranks: Ranks) -> Communicator:
        """Make torch's process group; see `engine.connect`. Collective."""
        return connect(ranks)

    def _engine(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        options: dict[str, Any],
    ) -> Engine:
        return DDPEngine(module, optimizer, communicator, **options)
