"""Train on shards with torch's own `fully_shard` (FSDP2)."""

from arsg_dist.engine import connect_torch as connect
from arsg_dist.fsdp.engine import FSDPEngine
from arsg_dist.fsdp.units import shard, units_of

__all__ = ["FSDPEngine", "connect", "shard", "units_of"]
