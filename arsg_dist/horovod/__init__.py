"""ARSG under Horovod: the replicated form, `hvd.DistributedOptimizer` over `ARSG`."""

try:
    import horovod.torch as _horovod  # noqa: F401
except ImportError as error:
    raise ImportError(
        "arsg_dist.horovod needs Horovod built with PyTorch: run launch/setup.sh in a checkout, which builds it "
        "(extra: 'arsg-dist[horovod]'; Horovod's own release does not compile against this torch)"
    ) from error

from arsg_dist.horovod.communicator import HorovodCommunicator, connect
from arsg_dist.horovod.engine import HorovodEngine

__all__ = ["HorovodCommunicator", "HorovodEngine", "connect"]
