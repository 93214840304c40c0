"""Train with ARSG under Horovod, replicated or sharded."""

try:
    import horovod.torch as _horovod  # noqa: F401
except ImportError as error:
    raise ImportError(
        "arsg_dist.horovod needs Horovod built with PyTorch: run launch/setup.sh in a checkout, which builds it "
        "(extra: 'arsg-dist[horovod]'; Horovod's own release does not compile against this torch)"
    ) from error

from arsg_dist.horovod.broadcast import broadcast_optimizer_state, broadcast_parameters, register
from arsg_dist.horovod.comm.communicator import HorovodCommunicator, connect
from arsg_dist.horovod.comm.environment import check_environment, check_world_size, set_stall_defaults
from arsg_dist.horovod.comm.tensors_in_flight import hold_tensors_in_flight
from arsg_dist.horovod.engine import HorovodEngine, HorovodShardedEngine
from arsg_dist.horovod.replicated.optimizer import DistributedOptimizer, ReplicatedOptimizer
from arsg_dist.horovod.sharded.optimizer import ShardedOptimizer

register()
hold_tensors_in_flight()

__all__ = [
    "DistributedOptimizer",
    "HorovodCommunicator",
    "HorovodEngine",
    "HorovodShardedEngine",
    "ReplicatedOptimizer",
    "ShardedOptimizer",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "check_environment",
    "check_world_size",
    "connect",
    "register",
    "set_stall_defaults",
]
