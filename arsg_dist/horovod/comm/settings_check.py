"""Check that all ranks of a Horovod job update with the same settings, while the update's gradients travel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
from torch.optim import Optimizer

from arsg_dist.engine.settings import agree, differ, differences, message_of, ranks_of, settings_of
from arsg_dist.horovod.comm.process_groups import Group


@contextmanager
def same_settings(optimizer: Optimizer, process_set: Any, name: str) -> Iterator[None]:
    """Compare the settings of all ranks' parameter groups during a block. Collective.

    The block exchanges what an update needs; the comparison goes on meanwhile.

    Args:
        optimizer: whose settings (those that its class has defaults for) are compared.
        process_set: the ranks.
        name: precedes the names of operations, the same on all ranks.

    Raises:
        JobError: they differ, after the block and on every rank; it names the ranks.
    """
    if not process_set.included() or process_set.size() == 1:
        yield
        return
    settings = settings_of(optimizer)
    handle = hvd.allreduce_async(
        message_of(settings), op=hvd.Sum, name=f"{name}.settings", process_set=process_set
    )
    found = ""
    try:
        yield
    finally:  # also where the block failed: the other ranks ask this one
        total = hvd.synchronize(handle)
        if not agree(total):
            found = "on some ranks"
            if ranks_of(total) == process_set.size():  # else some have joined, and do not answer
                of_ranks = Group(process_set, name).all_gather_object(settings, "different_settings")
                found = differences(of_ranks) or found
    if found:
        raise differ(found, "hvd.allreduce(loss)")
