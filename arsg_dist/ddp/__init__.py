"""Train on replicas with torch's own DistributedDataParallel."""

from arsg_dist.ddp.engine import DDPEngine
from arsg_dist.ddp.shards import Shards
from arsg_dist.engine import connect_torch as connect

__all__ = ["DDPEngine", "Shards", "connect"]
