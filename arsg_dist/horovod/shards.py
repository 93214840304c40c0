"""The parameters, masters and state of a ShardedOptimizer, divided among the ranks."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from arsg_dist.horovod import sharded_arguments
from arsg_dist.horovod.buckets import ParameterSpec
from arsg_dist.horovod.inner_optimizer import InnerOptimizer
from arsg_dist.horovod.load_state import load_state
from arsg_dist.horovod.parameter_gather import PendingGather, WatchedList
from arsg_dist.horovod.partition import Exchange, Partition, ShardGroups, shard_groups
from arsg_dist.horovod.sharded_layout import lay_out


class Shards(torch.optim.Optimizer):
    """What a ShardedOptimizer consists of, and how it is divided anew; `ShardedOptimizer` makes it."""

    process_set: Any
    backward_passes_per_step: int
    _elastic: bool
    _shard_group: str | int
    _groups: ShardGroups
    _exchange_between: Callable[[ShardGroups], Exchange]
    _exchange: Exchange
    _bucket_bytes: int
    _inner: InnerOptimizer
    _trained: list[list[tuple[str, Tensor]]]
    _frozen: list[tuple[str, Tensor]]
    _names: dict[Tensor, str]
    _partitions: list[Partition]
    _pending: PendingGather
    _whole_state: dict[Any, dict[str, Any]]
    _should_synchronize = True
    _at_base_iterate = False
    _started_equal = False

    def _add(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Includes further parameters, or none of them if that fails. Collective, except in an elastic job."""
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
        self._trained.append(trained)
        try:
            if not self._elastic:
                lay_out(self)
        except BaseException:
            self._trained.pop()
            raise
        self._frozen += frozen
        for _, parameter in trained:
            sharded_arguments.sharded_by[parameter] = weakref.ref(self)
        for group in self.param_groups:
            if not isinstance(group["params"], WatchedList):
                group["params"] = WatchedList(group["params"], self._pending.wait)

    def _fail_together(self) -> AbstractContextManager[None]:
        # Where ranks come and go, those that train do not answer to one that is still being built.
        return nullcontext() if self._elastic else self._groups.world.fail_together()

    @property
    def _parameter_names(self) -> dict[Tensor, str]:
        """Parameter → name, as Horovod calls what its users read."""
        return {parameter: name for part in (*self._trained, self._frozen) for name, parameter in part}

    @property
    def shard_world_size(self) -> int:
        """Among how many ranks the state is divided."""
        return self._groups.shard.size

    # Ranks that come and go

    @property
    def laid_out(self) -> bool:
        """Whether the parameters are divided among the ranks: at once, or in an elastic job by `TorchState`."""
        return bool(self._partitions)

    def _require_layout(self, what: str) -> None:
        if not self._partitions:
            raise RuntimeError(
                f"{what} of a ShardedOptimizer in an elastic job works inside the function that "
                "arsg_dist.horovod.elastic.run decorates, after elastic.TorchState(model=..., optimizer=...): only "
                "there are the ranks known. Load the model and the plain optimizer before wrapping it, or load "
                "inside that function"
            )

    def abandon_layout(self) -> None:
        """Forgets the layout and the update under way, without a message to other ranks, which may be dead.

        The parameters may hold anything if exchanges were under way. State is lost: `reshard` brings it back.
        """
        self._pending.abandon()
        for partition in self._partitions:
            partition.abandon()
        self._partitions.clear()
        self._inner.forget_state()
        self._should_synchronize, self._at_base_iterate = True, False

    def reshard(self, state: dict[str, Any], label: str) -> None:
        """Divides parameters and state among the ranks there are now. Collective.

        Parameters, `param_groups` and this object stay the ones they are; their memory moves.

        Args:
            state: the whole state, the same on every rank.
            label: precedes the names of all exchanges from now on, the same on ranks of every age.

        Raises:
            ValueError: the state does not fit, or the ranks differ.
            JobError: another rank raised it.
            RuntimeError: the exchanges return wrong data here.
        """
        self.abandon_layout()
        self._groups = shard_groups(self._shard_group, self.process_set, label)
        self._exchange = self._exchange_between(self._groups)
        self._whole_state = {}
        self._started_equal = False
        try:
            lay_out(self)
            load_state(self, state)
        except BaseException:
            self.abandon_layout()
            raise

    # Masters and parameters

    def _bring_masters_up_to_date(self) -> None:
        self.synchronize_parameters()
        thawed = [name for name, parameter in self._frozen if parameter.requires_grad]
        if thawed:
            raise RuntimeError(
                f"{', '.join(thawed)} had requires_grad=False when ShardedOptimizer was made and has no shard: let it "
                "require gradients then (and switch it off and on afterwards), or add it later with add_param_group"
            )
        for partition in self._partitions:
            partition.adopt_parameters()
        if not self._started_equal:
            sums = self._groups.world.all_gather_object(
                [p.checksums() for p in self._partitions], "parameters"
            )
            if any(other != sums[0] for other in sums):
                raise RuntimeError(
                    "the ranks start with different parameters: call "
                    "hvd.broadcast_parameters(model.state_dict(), root_rank=0) before the first step"
                )
            self._started_equal = True

    def synchronize_parameters(self) -> None:
        """Waits until the parameters of the last update are there; before reading them past their modules."""
        self._pending.wait()

    def _gather_now(self) -> None:
        self._pending.wait()
        for partition in self._partitions:
            partition.start_gather()
        self._pending.wait()

    def _refuse_at_base_iterate(self, what: str) -> None:
        if self._at_base_iterate:
            raise RuntimeError(
                f"{what} inside base_iterate(): the parameters are not at the observation point x"
            )

    # Shard by shard, for checkpoints

    @property
    def partitions(self) -> Sequence[Partition]:
        """The parameters in flat memory, and which part of it this rank owns."""
        return self._partitions

    @property
    def specs(self) -> list[ParameterSpec]:
        """Of all sharded parameters."""
        return [spec for partition in self._partitions for spec in partition.layout.parameters]

    @property
    def writes_shards(self) -> bool:
        """Whether this rank is in the first of several groups that hold the same shards (`shard_group`)."""
        return self._groups.replicas is None or self._groups.replicas.rank == 0

    def state_of(self, piece: Tensor) -> dict[str, Any]:
        """The optimizer's state of a piece; empty before the first update."""
        state: dict[str, Any] = self._inner.state.get(piece, {})
        return state

    def refuse_in_update(self, what: str) -> None:
        """Raises RuntimeError after a backward pass and before `step`, and where there are no shards yet."""
        self._require_layout(what)
        if any(p.gradients.under_way and not p.gradients.synchronized for p in self._partitions):
            raise RuntimeError(f"{what} after backward() and before step()")

    def update_masters(self, what: str) -> None:
        """Takes over into the pieces what has been written into the parameters. Every rank must call it."""
        self._require_layout(what)
        self._bring_masters_up_to_date()

    def load_pieces(self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        """Takes over the settings of groups and the state of this rank's pieces, which are filled already."""
        self._whole_state = {}
        self._inner.load(groups, state)
        for partition in self._partitions:
            partition.take_gradients_back()

    def publish_masters(self) -> None:
        """Sends the pieces into the parameters of all ranks. Every rank must call it."""
        self._gather_now()

    def close(self) -> None:
        """Takes the hooks off the parameters and their modules; the parameters stay as they are, on this rank."""
        self._pending.close()
        for partition in self._partitions:
            partition.gradients.remove()
            for parameter in partition.parameters:
                sharded_arguments.sharded_by.pop(parameter, None)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a ShardedOptimizer cannot be copied or pickled; save its state_dict()")
