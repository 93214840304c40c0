"""Commits of a sharded optimizer in an elastic job: every rank holds the whole state, so any rank may die."""

from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.elastic.state import StateHandler

from arsg_dist.horovod import sharded_arguments
from arsg_dist.horovod.broadcast import broadcast_parameters
from arsg_dist.horovod.gather_state import outline_of, own_state, tensors_of
from arsg_dist.horovod.group import Group
from arsg_dist.horovod.sharded import ShardedOptimizer


class ShardedHandler(StateHandler):  # type: ignore[misc]
    """Keeps the committed state of a sharded optimizer, whole, in the host memory of every rank.

    A commit is made in two steps: `stage` gathers it, which fails if a rank dies meanwhile, and `save` puts it in
    the place of the one before, which cannot fail. What is committed together is staged first, then saved.

    Args:
        optimizer: sharded over all ranks.

    Raises:
        ValueError: it is not.
    """

    def __init__(self, optimizer: ShardedOptimizer) -> None:
        sharded_arguments.check_elastic(optimizer._shard_group, optimizer.process_set)
        super().__init__(optimizer)
        self.label = "elastic"
        """Precedes the names of exchanges; differs between the optimizers of a state."""
        self._saved: dict[str, Any] = {} if optimizer.laid_out else own_state(optimizer)
        self._staged: dict[str, Any] | None = None

    @property
    def committed(self) -> dict[str, Any]:
        """The last commit, as of `ShardedOptimizer.state_dict`."""
        return self._saved

    def stage(self) -> None:
        """Gathers the state of now on every rank. Collective."""
        if self.value.laid_out:
            self._staged = self.value.gather_state(everywhere=True)

    def save(self) -> None:
        """Makes what was staged the commit; on this rank alone."""
        if self._staged is not None:
            self._saved, self._staged = self._staged, None

    def restore(self) -> None:
        """Gives up what is under way, on this rank alone; the commit is loaded by `sync`, with the new ranks."""
        self._staged = None
        self.value.abandon_layout()

    def sync(self) -> None:
        """Gives every rank its part of rank 0's commit, or of rank 0's state if there is none yet. Collective."""
        self.stage()  # where nothing was lost, it is the state of now that goes on
        self._staged = _broadcast(self._staged or self._saved, self.label)
        self.value.reshard(self._staged, self.label)

    def set_value(self, value: Any) -> None:
        """Refuses another optimizer."""
        if value is not self.value:
            raise TypeError("a sharded optimizer cannot be exchanged in a TorchState: make a new TorchState")


def _broadcast(state: dict[str, Any], label: str) -> dict[str, Any]:
    """Rank 0's state on every rank, bit by bit. Collective."""
    first = hvd.rank() == 0
    outline: Any = outline_of(state) if first else None
    received: dict[str, Any] = Group(name=label).all_gather_object(outline, "outline")[0]
    if first:
        received = state
    tensors = []
    for number, (holder, key) in enumerate(tensors_of(received)):
        if not first:
            holder[key] = torch.empty_like(holder[key], device="cpu")
        tensors.append((f"{label}.commit{number}", holder[key]))
    broadcast_parameters(tensors, root_rank=0)
    return received
