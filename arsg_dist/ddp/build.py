"""Build the engine `ddp` for a training."""

from typing import Any, ClassVar

import torch
from torch import nn

from arsg_dist.ddp.engine import DDPEngine, check_divided
from arsg_dist.ddp.shards import Shards
from arsg_dist.engine import LocalBuilder, TrainingSettings, connect_torch, require_backend
from arsg_dist.optim.by_name import stepping_class


class DDPBuilder(LocalBuilder):
    """Build a `DDPEngine`."""

    _engine = DDPEngine
    _shards: Shards | None = None
    connect = staticmethod(connect_torch)
    options: ClassVar = {
        "backend": ("auto", "gloo", "nccl"),
        "find_unused_parameters": (True, False),
        "shard_update": (True, False),
    }

    def __init__(self, settings: TrainingSettings, world_size: int) -> None:
        require_backend(settings.engine_options.get("backend", "auto"))
        if settings.engine_options.get("shard_update"):
            check_divided(stepping_class(settings.optimizer_type, settings.optimizer_params))
        super().__init__(settings, world_size)

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        settings = self._settings
        groups = settings.parameter_groups(module)
        if settings.engine_options.get("shard_update"):
            self._shards = Shards(groups, order=module.parameters())
            groups = self._shards.groups
        return settings.build_optimizer(groups)

    def _engine_options(self) -> dict[str, Any]:
        chosen = self._settings.engine_options
        return {
            "shards": self._shards,
            "find_unused_parameters": chosen.get("find_unused_parameters", False),
        }
