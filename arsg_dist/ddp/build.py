"""Build the engine `ddp` for a training."""

from typing import Any, ClassVar

import torch
from torch import nn

from arsg_dist.ddp.engine import DDPEngine
from arsg_dist.ddp.shards import Shards
from arsg_dist.engine import LocalBuilder, TrainingSettings, connect_torch
from arsg_dist.optim.by_name import ELEMENT_WISE


class DDPBuilder(LocalBuilder):
    """Build a `DDPEngine`."""

    _engine = DDPEngine
    _shards: Shards | None = None
    connect = staticmethod(connect_torch)
    options: ClassVar = {"find_unused_parameters": (True, False), "shard_update": (True, False)}

    def __init__(self, settings: TrainingSettings, world_size: int) -> None:
        known = [kind.__name__ for kind in ELEMENT_WISE]
        if settings.engine_options.get("shard_update") and settings.optimizer_type not in known:
            raise ValueError(
                f"engine_options.shard_update divides the update of each element among the ranks, and "
                f"{settings.optimizer_type} is not known to update each by itself: leave it out, or take one of "
                f"{', '.join(known)}"
            )
        super().__init__(settings, world_size)

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        settings = self._settings
        groups = settings.parameter_groups(module)
        if settings.engine_options.get("shard_update"):
            self._shards = Shards(groups)
            groups = self._shards.groups
        return settings.build_optimizer(groups)

    def _engine_options(self) -> dict[str, Any]:
        chosen = {key: value for key, value in self._settings.engine_options.items() if key != "shard_update"}
        return {"shards": self._shards, **chosen}
