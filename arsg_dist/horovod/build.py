"""Build Horovod's engines for a training."""

from arsg_dist.engine import LocalBuilder
from arsg_dist.horovod.comm.communicator import connect
from arsg_dist.horovod.engine import HorovodEngine, HorovodShardedEngine


class HorovodBuilder(LocalBuilder):
    """Build a `HorovodEngine`."""

    _engine = HorovodEngine
    _channels_last = False  # gradients of such parameters would have to be copied
    connect = staticmethod(connect)


class HorovodShardedBuilder(LocalBuilder):
    """Build a `HorovodShardedEngine`."""

    _engine = HorovodShardedEngine
    connect = staticmethod(connect)
