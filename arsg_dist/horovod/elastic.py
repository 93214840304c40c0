"""Elastic jobs: ranks come and go, training goes on from the last commit. For the replicated form.

    state = arsg_dist.horovod.elastic.TorchState(model=model, optimizer=optimizer, schedule=schedule, update=0)

    @arsg_dist.horovod.elastic.run
    def train(state): ...

is used as Horovod's own (`hvd.elastic`), and fills its gaps.
"""

import copy
from typing import Any, Protocol, runtime_checkable

import horovod.torch as hvd
from horovod.common.exceptions import HostsUpdatedInterrupt
from horovod.torch.elastic import run
from horovod.torch.elastic.state import StateHandler, get_handler_registry
from torch.optim import Optimizer

__all__ = ["TorchState", "run"]


class TorchState(hvd.elastic.TorchState):  # type: ignore[misc]
    """`hvd.elastic.TorchState` that loses nothing.

    Beside what Horovod's keeps (models, optimizers, `ElasticSampler`, plain values), anything with `state_dict` and
    `load_state_dict` is kept by its state: schedulers, `ObservationBoost`, gradient scalers. Horovod's would copy such
    an object together with another optimizer to the other ranks, and would not take it back to the last commit.

    - A rank that joined holds the last commit from then on. With Horovod's it holds its own initial weights until
      the next commit, and if the others die before, training starts over from these with the old counters.
    - Gradients of an interrupted update are forgotten. With Horovod's they are added to the next update's.
    - Every change of hosts that all ranks survive commits first and synchronizes afterwards, removals too.

    Args:
        model: to train.
        optimizer: `ARSG` wrapped by `arsg_dist.horovod.DistributedOptimizer`.
        kwargs: more to keep, reachable as attributes.

    Raises:
        TypeError: a sharded optimizer, of which no rank holds the whole state.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        for name, value in {"optimizer": optimizer, **kwargs}.items():
            if hasattr(value, "shard_world_size"):
                raise TypeError(
                    f"{name} is sharded: an elastic job needs the replicated form, "
                    "arsg_dist.horovod.DistributedOptimizer"
                )
        registry = get_handler_registry()
        if (_Stateful, _StatefulHandler) not in registry:
            registry.append((_Stateful, _StatefulHandler))
        super().__init__(model=model, optimizer=optimizer, **kwargs)

    def sync(self) -> None:
        """Gives every rank rank 0's state, and commits it."""
        super().sync()
        self.save()

    def restore(self) -> None:
        """Goes back to the last commit."""
        super().restore()
        for handler in self._handlers.values():
            if isinstance(handler.value, Optimizer):
                for group in handler.value.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None

    def check_host_updates(self) -> None:
        """Ends the running function on every rank if hosts came or went, after a commit.

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
    """Keeps what has a state_dict by its state_dict."""

    def __init__(self, value: _Stateful) -> None:
        super().__init__(value)
        self.save()

    def save(self) -> None:
        self._saved = copy.deepcopy(self.value.state_dict())

    def restore(self) -> None:
        self.value.load_state_dict(copy.deepcopy(self._saved))

    def sync(self) -> None:
        self.value.load_state_dict(
            hvd.broadcast_object(self.value.state_dict(), root_rank=0, name="elastic.stateful")
        )
