"""Replicated data parallelism by torch's own DistributedDataParallel, behind the `Engine` interface."""

from arsg_dist.ddp.engine import DDPEngine, connect

__all__ = ["DDPEngine", "connect"]
