"""Leave the other ranks without leaving them in the lurch: join and shut down."""

import gc
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd

from arsg_dist.horovod.sharded.arguments import sharded_by
from arsg_dist.horovod.sharded.gather import finish_gathers

_horovod_join: Callable[..., int] = hvd.join
_horovod_shutdown: Callable[..., Any] = hvd.shutdown


def join(device: int = -1) -> int:
    """Join as `hvd.join`; refused while there is a `ShardedOptimizer`. Collective.

    A rank that has joined has no shards to send: Horovod 0.28.1 crashes (segmentation fault) when the others ask it for
    one.

    Args:
        device: as of Horovod.

    Returns:
        The rank that joined last.

    Raises:
        RuntimeError: a ShardedOptimizer is in use.
    """
    gc.collect()  # one that was dropped without close() must not count on some ranks and not on others
    optimizers = list(sharded_by.values())  # type: ignore[no-untyped-call]
    if any(optimizer() is not None for optimizer in optimizers):
        raise RuntimeError(
            "hvd.join() cannot be used with a ShardedOptimizer, whose updates need every rank: give every rank as many "
            "batches (DistributedSampler(drop_last=True)) and call hvd.barrier(), or close() the optimizer before"
        )
    finish_gathers()
    return _horovod_join(device)


def shutdown(*args: Any, **kwargs: Any) -> Any:
    """Shut down as `hvd.shutdown`, after the parameters of the last update arrived.

    Here and on the other ranks: Horovod ends what is under way on every rank, and a `ShardedOptimizer` sends parameters
    after its `step()`.

    Args:
        args: as of Horovod.
        kwargs: as of Horovod.
    """
    finish_gathers()
    return _horovod_shutdown(*args, **kwargs)
