"""Train in elastic jobs: ranks come and go, training goes on from the last commit.

    state = arsg_dist.horovod.elastic.TorchState(model=model, optimizer=optimizer, schedule=schedule, update=0)

    @arsg_dist.horovod.elastic.run
    def train(state): ...

is used as Horovod's own (`hvd.elastic`), and fills its gaps.
"""

import copy
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HostsUpdatedInterrupt
from horovod.torch.elastic import run
from horovod.torch.elastic.state import StateHandler, get_handler_registry
from torch import nn
from torch.optim import Optimizer

from arsg_dist.horovod.broadcast import broadcast_parameters
from arsg_dist.horovod.comm.process_groups import Group
from arsg_dist.horovod.sharded.arguments import check_elastic
from arsg_dist.horovod.sharded.optimizer import ShardedOptimizer
from arsg_dist.horovod.sharded.state_dict import outline_of, own_state, tensors_of

__all__ = ["TorchState", "run"]


class ShardedHandler(StateHandler):  # type: ignore[misc]
    """Keep the committed state of a sharded optimizer in every rank's host memory.

    Every rank holds the whole state, so any rank may die. A commit is made in two steps: `stage` gathers it, which
    fails if a rank dies meanwhile, and `save` puts it in the place of the one before, which cannot fail. What is
    committed together is staged first, then saved.

    Args:
        optimizer: sharded over all ranks.

    Raises:
        ValueError: it is not.
    """

    def __init__(self, optimizer: ShardedOptimizer) -> None:
        check_elastic(optimizer.shard_group, optimizer.process_set)
        super().__init__(optimizer)
        self.label = "elastic"
        """Precedes the names of exchanges; differs between the optimizers of a state."""
        self._saved: dict[str, Any] = {} if optimizer.shards.partitions else own_state(optimizer.inner)
        self._staged: dict[str, Any] | None = None

    @property
    def committed(self) -> dict[str, Any]:
        """The last commit, as of `ShardedOptimizer.state_dict`."""
        return self._saved

    def stage(self) -> None:
        """Gather the state of now on every rank. Collective."""
        if self.value.shards.partitions:
            self._staged = self.value.gather_state(everywhere=True)

    def save(self) -> None:
        """Make what was staged the commit, on this rank alone."""
        if self._staged is not None:
            self._saved, self._staged = self._staged, None

    def restore(self) -> None:
        """Give up what is under way, on this rank alone; `sync` loads the commit."""
        self._staged = None
        self.value.abandon_layout()

    def sync(self) -> None:
        """Give every rank its part of rank 0's commit, else of its state. Collective."""
        self.stage()  # where nothing was lost, it is the state of now that goes on
        self._staged = _broadcast(self._staged or self._saved, self.label)
        self.value.reshard(self._staged, self.label)

    def set_value(self, value: Any) -> None:
        """Refuse another optimizer."""
        if value is not self.value:
            raise TypeError("a sharded optimizer cannot be exchanged in a TorchState: make a new TorchState")


class TorchState(hvd.elastic.TorchState):  # type: ignore[misc]
    """Keep what `hvd.elastic.TorchState` keeps, and lose nothing.

    Beside what Horovod's keeps (models, optimizers, `ElasticSampler`, plain values), anything with `state_dict` and
    `load_state_dict` is kept by its state: schedulers, `ObservationBoost`, gradient scalers. Horovod's would copy such
    an object together with another optimizer to the other ranks, and would not take it back to the last commit.

    - A rank that joined holds the last commit from then on. With Horovod's it holds its own initial weights until
      the next commit, and if the others die before, training starts over from these with the old counters.
    - Gradients of an interrupted update are forgotten. With Horovod's they are added to the next update's.
    - Every change of hosts that all ranks survive commits first and synchronizes afterwards, removals too.
    - A commit in the middle of which a rank dies is no commit, on this rank, of anything.

    With a `ShardedOptimizer` a commit gathers its whole state on every rank, so every rank needs host memory for it
    (for ARSG 12 bytes per parameter, with half-precision parameters 16), and twice during a commit. In an elastic
    job it is laid out when the function starts, anew whenever ranks came or went, and works inside it only.

    Args:
        model: to train.
        optimizer: `ARSG` wrapped by `arsg_dist.horovod.DistributedOptimizer`, or a `ShardedOptimizer`.
        kwargs: more to keep, reachable as attributes.

    Raises:
        ValueError: a `ShardedOptimizer` that is not over all ranks, or with parameters of no model given here.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        registry = get_handler_registry()
        if (ShardedOptimizer, ShardedHandler) not in registry:
            registry.insert(
                0, (ShardedOptimizer, ShardedHandler)
            )  # it is an Optimizer too: the first one counts
        if (_Stateful, _StatefulHandler) not in registry:
            registry.append((_Stateful, _StatefulHandler))
        super().__init__(model=model, optimizer=optimizer, **kwargs)
        for name, handler in self._handlers.items():
            if isinstance(handler, ShardedHandler):
                handler.label = f"elastic.{name}"
                self._check_models_hold(name, handler.value)

    def _check_models_hold(self, name: str, optimizer: ShardedOptimizer) -> None:
        models = [
            handler.value for handler in self._handlers.values() if isinstance(handler.value, nn.Module)
        ]
        held = {id(parameter) for model in models for parameter in model.parameters()}
        missing = sum(id(p) not in held for group in optimizer.param_groups for p in group["params"])
        if missing:
            raise ValueError(
                f"{missing} parameters of {name} belong to no model given to TorchState, so a commit would not hold "
                "them: give every model that the optimizer trains"
            )

    def _sharded(self) -> Iterator[ShardedHandler]:
        return (handler for handler in self._handlers.values() if isinstance(handler, ShardedHandler))

    def save(self) -> None:
        """Commit without looking for changes of hosts. Collective if sharded."""
        for handler in self._sharded():
            handler.stage()
        super().save()

    def sync(self) -> None:
        """Give every rank rank 0's state, and commit it. Collective."""
        super().sync()
        super().save()  # a sharded optimizer's commit has just been received

    def reset(self) -> None:
        """Forget what is under way when ranks came or went, before `sync`."""
        for handler in self._sharded():
            handler.restore()
        self._forget_gradients()

    def restore(self) -> None:
        """Go back to the last commit."""
        for handler in self._sharded():
            handler.restore()  # first: reading parameters that are on their way would wait for dead ranks
        super().restore()
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for handler in self._handlers.values():
            if isinstance(handler.value, Optimizer):
                for group in handler.value.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None

    def check_host_updates(self) -> None:
        """End the running function on every rank if hosts came or went, after a commit.

        Raises:
            HostsUpdatedInterrupt: for `run`, which starts the function again with the new ranks.
        """
        try:
            super().check_host_updates()
        except HostsUpdatedInterrupt:
            self.save()
            raise HostsUpdatedInterrupt(skip_sync=False) from None


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class _StatefulHandler(StateHandler):  # type: ignore[misc]
    """Keep what has a state_dict by its state_dict."""

    def __init__(self, value: _Stateful) -> None:
        super().__init__(value)
        self.save()

    def save(self) -> None:
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        # Horovod's objects, which are pickled: the state of a class of the user's may hold anything. So does what
        # Horovod sends of a TorchState's plain values.
        self.value.load_state_dict(
            hvd.broadcast_object(self.value.state_dict(), root_rank=0, name="elastic.stateful")
        )


def _broadcast(state: dict[str, Any], label: str) -> dict[str, Any]:
    """Broadcast rank 0's state, bit by bit. Collective."""
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
