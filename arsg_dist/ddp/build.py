"""Build the engine `ddp` for a training."""

from typing import Any, ClassVar

from arsg_dist.ddp.engine import DDPEngine
from arsg_dist.engine import LocalBuilder, connect_torch


class DDPBuilder(LocalBuilder):
    """Build a `DDPEngine`."""

    _engine = DDPEngine
    connect = staticmethod(connect_torch)
    options: ClassVar = {"find_unused_parameters": (True, False)}

    def _engine_options(self) -> dict[str, Any]:
        return dict(self._settings.engine_options)
