"""Build Horovod's engines for a training."""

from typing import Any

import torch
from torch import nn

from arsg_dist.engine import Communicator, Engine, LocalBuilder, Ranks
from arsg_dist.horovod.comm.communicator import connect
from arsg_dist.horovod.engine import HorovodEngine, HorovodShardedEngine


class HorovodBuilder(LocalBuilder):
    """Build a `HorovodEngine`."""

    _engine_class: type[HorovodEngine] = HorovodEngine
    _channels_last = False  # gradients of such parameters would have to be copied

    @staticmethod
    def connect(ranks: Ranks) -> Communicator:
        """Initialise Horovod; see `communicator.connect`. Collective."""
        return connect(ranks)

    def _engine(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        options: dict[str, Any],
    ) -> Engine:
        return self._engine_class(module, optimizer, communicator, **options)


class HorovodShardedBuilder(HorovodBuilder):
    """Build a `HorovodShardedEngine`."""

    _engine_class = HorovodShardedEngine
    _channels_last = True
