"""Build the engine `ddp` for a training."""

from arsg_dist.ddp.engine import DDPEngine
from arsg_dist.engine import LocalBuilder, connect_torch


class DDPBuilder(LocalBuilder):
    """Build a `DDPEngine`."""

    _engine = DDPEngine
    connect = staticmethod(connect_torch)
