"""Replicated data parallelism by torch's own DistributedDataParallel, behind the `Engine` interface."""

from arsg_dist.ddp.engine import DDPEngine
from arsg_dist.engine import connect_torch as connect

__all__ = ["DDPEngine", "connect"]
