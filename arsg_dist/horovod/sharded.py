"""An optimizer whose state exists once in a Horovod job."""

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import horovod.torch as hvd
import torch
from torch import Tensor

from arsg_dist.horovod import sharded_arguments, sharded_state
from arsg_dist.horovod.buckets import ParameterSpec
from arsg_dist.horovod.clipping import clip_shards
from arsg_dist.horovod.exchange import Started, choose_reduce_scatter
from arsg_dist.horovod.inner_optimizer import InnerOptimizer
from arsg_dist.horovod.parameter_gather import GatherMode
from arsg_dist.horovod.partition import Exchange, Partition, ShardGroups, shard_groups
from arsg_dist.horovod.second_sum import CheckedReduceScatter
from arsg_dist.horovod.sharded_layout import lay_out

_number = (
    itertools.count()
)  # Horovod tells exchanges apart by their names: those of two optimizers must differ


class ShardedOptimizer(torch.optim.Optimizer):
    """Stands in for `hvd.DistributedOptimizer`; optimizer state and fp32 masters are divided among the ranks.

    A rank owns 1/world_size of every bucket of parameters. Gradients are reduced to their owners while the backward
    pass goes on, owners update their part with `optimizer`, and the parameters are gathered in place on all ranks
    while the program goes on; `arsg_dist.horovod.parameter_gather` says who waits for them.

    Used as Horovod's, with these differences:

    - After the backward pass `parameter.grad` is a placeholder that refuses every computation. Clip with
      `clip_grad_norm_` of this class, then `step()`; the form with `synchronize()` and `skip_synchronize()` works too.
      `torch.amp.GradScaler` works.
    - `state_dict`, `load_state_dict`, `base_iterate`, `add_param_group` and `clip_grad_norm_` are collective: every
      rank calls them.
    - A parameter without gradient in an update has gradient zero, on any number of ranks, as in Horovod with several:
      momentum and weight decay move it. One with `requires_grad=False` is left alone.
    - `hvd.broadcast_parameters` works at any time. `hvd.broadcast_optimizer_state` raises: state is never replicated.

    Args:
        optimizer: over the parameters, each element of which is updated by itself (ARSG, AdamW, SGD, ...). State it
            already has is kept. Use it no more afterwards; its `param_groups` are shared with this one.
        named_parameters: (name, parameter) pairs with unique names, usually `model.named_parameters()`.
        compression: `hvd.Compression.none` or `fp16`, or a compressor that keeps a tensor's shape.
        backward_passes_per_step: their gradients are added up before the exchange (not averaged).
        op: `hvd.Average` or `hvd.Sum`.
        gradient_predivide_factor: with Average, gradients are divided by it before the sum and multiplied after.
        num_groups: refused; buckets take its place.
        groups: refused; buckets take its place.
        sparse_as_dense: make sparse gradients dense; else they are refused.
        process_set: the ranks that train together.
        bucket_mb: size of a bucket in MB of gradient. 8 to 32 is best.
        gather: "lazy" or "eager": whether `step()` returns before the parameters are there.
        shard_group: "job": shards over all ranks; "node": over those of a host, with an all-reduce of the shards
            between hosts; a number: over so many consecutive ranks.
        reduce_scatter: "auto", "alltoall" or "reducescatter"; see `arsg_dist.horovod.exchange`.
        element_wise: says that an optimizer of another class does update each element by itself.

    Raises:
        ValueError: an argument that cannot be served.
        TypeError: `optimizer` is not a torch optimizer, or not known to work element by element.
        JobError: another rank raised one of these, or its parameters differ.
        RuntimeError: the exchanges return wrong data here.
    """

    _ready = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        compression: Any = hvd.Compression.none,
        backward_passes_per_step: int = 1,
        op: Any = hvd.Average,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: Any = None,
        sparse_as_dense: bool = False,
        process_set: Any = hvd.global_process_set,
        *,
        bucket_mb: float = 16.0,
        gather: GatherMode = "lazy",
        shard_group: str | int = "job",
        reduce_scatter: str = "auto",
        element_wise: bool = False,
    ) -> None:
        self._elastic = sharded_arguments.in_elastic_job()
        if self._elastic:
            sharded_arguments.check_elastic(shard_group, process_set)
        self._shard_group, self.process_set = shard_group, process_set
        self._groups = shard_groups(shard_group, process_set, f"sharded{next(_number)}")
        with self._fail_together():
            sharded_arguments.check_optimizer(optimizer, element_wise)
            sharded_arguments.check_arguments(
                compression,
                backward_passes_per_step,
                op,
                gradient_predivide_factor,
                num_groups or groups,
                bucket_mb,
                gather,
            )
            named = sharded_arguments.names_of(optimizer.param_groups, named_parameters)
            sharded_arguments.check_parameters(named)
            sharded_state.check_state(named, optimizer)
            self._exchange_between: Callable[[ShardGroups], Exchange] = lambda groups: Exchange(
                CheckedReduceScatter(
                    choose_reduce_scatter(reduce_scatter, groups.shard, named[0][1].device.type)
                ),
                compression,
                prescale=1.0 / gradient_predivide_factor,
                postscale=gradient_predivide_factor / (groups.world.size if op == hvd.Average else 1),
                sparse_as_dense=sparse_as_dense,
                gather=gather,
            )
            self._exchange = self._exchange_between(self._groups)
        self._bucket_bytes = int(bucket_mb * 2**20)
        self.backward_passes_per_step = backward_passes_per_step
        self._should_synchronize = True
        self._at_base_iterate = False
        self._started_equal = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._trained: list[list[tuple[str, Tensor]]] = []
        self._partitions: list[Partition] = []
        self._abandoned: list[Started] = []
        self._frozen: list[tuple[str, Tensor]] = []
        self._whole_state = dict(optimizer.state)
        self._inner = InnerOptimizer(optimizer, self)
        self._inner.pieces_of_group = self._pieces_of_group
        self._add(named)
        self._ready = True

    def _add(self, named: Sequence[tuple[str, Tensor]]) -> None:
        trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self._trained.append(trained)
        self._frozen += [(name, parameter) for name, parameter in named if not parameter.requires_grad]
        for _, parameter in trained:
            sharded_arguments.sharded_by[parameter] = weakref.ref(self)
        if not self._elastic:
            lay_out(self)

    def _fail_together(self) -> AbstractContextManager[None]:
        # Where ranks come and go, those that train do not answer to one that is still being built.
        return nullcontext() if self._elastic else self._groups.world.fail_together()

    def _pieces_of_group(self, group: int) -> list[Tensor]:
        return [piece for partition in self._partitions for piece in partition.pieces_of_group(group)]

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
        for partition in self._partitions:
            self._abandoned += partition.abandon()
        self._partitions = []
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
        for started in self._abandoned:
            started.discard()
        self._abandoned = []
        self._groups = shard_groups(self._shard_group, self.process_set, label)
        self._exchange = self._exchange_between(self._groups)
        self._whole_state = {}
        self._started_equal = False
        try:
            lay_out(self)
            sharded_state.load_state(self, state)
        except BaseException:
            self.abandon_layout()
            raise

    # Gradients

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Changes how many backward passes make an update.

        Raises:
            ValueError: not an integer > 0.
            RuntimeError: some backward passes of an update are done.
        """
        sharded_arguments.check_passes(passes)
        if any(partition.gradients.under_way for partition in self._partitions):
            raise RuntimeError(
                "set_backward_passes_per_step() is for between updates: after step(), before backward()"
            )
        self.backward_passes_per_step = passes
        for partition in self._partitions:
            partition.gradients.passes = passes

    def synchronize(self) -> None:
        """Waits until this rank has its part of every gradient, reduced over all ranks."""
        self._require_layout("synchronize()")
        for partition in self._partitions:
            partition.gradients.synchronize()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Horovod's way to say that `synchronize()` was called before `step()`; not needed here."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, also those of an update that was synchronized and then not made.

        Args:
            set_to_none: False fills `.grad` with zeros, which costs the memory of all gradients.

        Raises:
            RuntimeError: after a backward pass and before `synchronize()` or `step()`.
        """
        for partition in self._partitions:
            if partition.gradients.under_way and not partition.gradients.synchronized:
                raise RuntimeError(
                    "zero_grad() after backward() and before step(): other ranks already add up these gradients; to "
                    "throw an update away call synchronize() first, on every rank"
                )
            partition.take_gradients_back()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None if set_to_none else torch.zeros_like(parameter)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        parameters: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Scales the reduced gradients down to a norm, as `torch.nn.utils.clip_grad_norm_`; every rank calls it.

        Args:
            max_norm: largest norm over all parameters.
            norm_type: 2 or inf, or another p ≥ 1.
            error_if_nonfinite: raise if the norm is not finite.
            parameters: clip these only.

        Returns:
            The norm before clipping, a 0-dim tensor, the same on all ranks.

        Raises:
            RuntimeError: the norm is not finite, and that is an error.
        """
        self.synchronize()
        return clip_shards(
            self._partitions,
            self._groups.shard,
            max_norm,
            norm_type,
            error_if_nonfinite=error_if_nonfinite,
            parameters=parameters,
        )

    def gradient_is_finite(self) -> bool:
        """Whether the reduced gradient is finite in every element, the same on all ranks; every rank calls it."""
        self.synchronize()
        shards = [shard for p in self._partitions for shard in p.gradients.shards if shard is not None]
        bad = torch.zeros(1)
        if shards:
            largest = torch.stack([value.float() for value in torch._foreach_norm(shards, torch.inf)])
            bad += float(not largest.isfinite().all())
        return not self._groups.shard.max(bad, "nonfinite").item()

    def check_sums(self, on: bool) -> None:
        """Whether gradients are summed up twice from the next backward pass on (`second_sum`); on all ranks alike."""
        self._exchange.reduce_scatter.checking = on

    def faulty_sums(self) -> list[str]:
        """What `check_sums` has found since the last call, the same on every rank; every rank calls it."""
        return self._exchange.reduce_scatter.faults()

    # The update

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes an update; the parameters arrive on the other ranks while the program goes on.

        Args:
            closure: computes the loss and its gradients, and returns the loss; called once.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: inside `base_iterate`; in `skip_synchronize()` without `synchronize()`; if a parameter's
                memory was replaced; at the first update, if the ranks have different parameters.
        """
        self._refuse_at_base_iterate("step")
        self._require_layout("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._should_synchronize and not all(p.gradients.synchronized for p in self._partitions):
            raise RuntimeError("step() in skip_synchronize(): call synchronize() before it")
        self.synchronize()
        self._bring_masters_up_to_date()
        for partition in self._partitions:
            partition.hand_out_gradients()
        self._inner.step()
        for partition in self._partitions:
            partition.take_gradients_back()
            partition.start_gather()
        return loss

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
        for partition in self._partitions:
            partition.gather.wait()

    # Points

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """`ARSG.base_iterate` on all ranks: the parameters are at θ inside, and bit by bit at x again afterwards.

        Raises:
            TypeError: the optimizer has no base iterate.
            RuntimeError: nested use, or `step` or `load_state_dict` inside.
        """
        self._inner.require("base_iterate")
        self._refuse_at_base_iterate("base_iterate")
        self._require_layout("base_iterate()")
        self._groups.world.meet("base_iterate()")
        self._bring_masters_up_to_date()
        with self._inner.on_pieces() as optimizer:
            inner = optimizer.base_iterate()  # type: ignore[attr-defined]
            inner.__enter__()
        self._at_base_iterate = True
        try:
            self._gather_now()
            yield
        finally:
            inner.__exit__(None, None, None)
            self._gather_now()
            self._at_base_iterate = False

    def _gather_now(self) -> None:
        for partition in self._partitions:
            partition.gather.wait()
            partition.start_gather()
            partition.gather.wait()

    def restart(self) -> None:
        """`ARSG.restart`.

        Raises:
            TypeError: the optimizer has no restart.
        """
        self._inner.require("restart")
        self._require_layout("restart()")
        with self._inner.on_pieces() as optimizer:
            optimizer.restart()  # type: ignore[attr-defined]

    def _refuse_at_base_iterate(self, what: str) -> None:
        if self._at_base_iterate:
            raise RuntimeError(
                f"{what} inside base_iterate(): the parameters are not at the observation point x"
            )

    # Groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of new parameters, between updates; every rank must call it alike.

        Args:
            param_group: as of torch; parameters may be given as (name, parameter) pairs.

        Raises:
            ValueError: the group does not fit.
            RuntimeError: some backward passes of an update are done.
        """
        if not self._ready:
            super().add_param_group(param_group)
            return
        self._refuse_at_base_iterate("add_param_group")
        if any(partition.gradients.under_way for partition in self._partitions):
            raise RuntimeError("add_param_group() is for between updates: after step() and zero_grad()")
        index = len(self.param_groups)
        with self._fail_together():
            # The base class of the inner optimizer checks its settings; both share the list of groups.
            self._inner.optimizer.add_param_group(param_group)
            group = self.param_groups[index]
            try:
                names = group.get("param_names", [f"group{index}.{i}" for i in range(len(group["params"]))])
                named = list(zip(names, group["params"], strict=True))
                sharded_arguments.check_parameters(named)
            except ValueError:
                del self.param_groups[index]
                raise
        self._started_equal = False
        self._add(named)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as the unsharded optimizer would return it, on rank 0. Every rank must call it.

        Rank 0 receives one tensor of state of one bucket at a time, so it needs the memory of the whole state and one
        bucket; the others need one bucket.

        Returns:
            On rank 0 `state` and `param_groups` as of torch, on CPU, and `master_params` (index → fp32 tensor) for
            half-precision parameters, which other optimizers ignore. On the others the same without tensors, marked
            `held_by_rank_0`; `load_state_dict` takes it.

        Raises:
            RuntimeError: called by `hvd.broadcast_optimizer_state`, by part of the ranks only, or in `base_iterate`.
        """
        if sys._getframe(1).f_globals.get("__name__") == "horovod.torch.functions":
            raise RuntimeError(
                "hvd.broadcast_optimizer_state would overwrite every rank's shard with rank 0's: leave it out. To "
                "resume, call load_state_dict(state) on every rank, where ranks other than 0 may give None"
            )
        return self.gather_state(everywhere=False)

    def gather_state(self, *, everywhere: bool) -> dict[str, Any]:
        """`state_dict`, on every rank if `everywhere`. Every rank must call it."""
        self._refuse_at_base_iterate("state_dict")
        self._require_layout("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._groups.world.meet("state_dict()")
        self._bring_masters_up_to_date()
        state = sharded_state.gather_state(self, everywhere=everywhere)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:  # type: ignore[override]
        """Loads what `state_dict` of this class or of the unsharded optimizer returned. Every rank must call it.

        Load the model's parameters too (before or after): half-precision parameters whose `master_params` do not
        round to them keep their own value.

        Args:
            state_dict: the whole state on every rank, each of which takes its part; or on rank 0 only and None on the
                others, to which rank 0 sends theirs, one tensor of one bucket at a time.

        Raises:
            ValueError: the state does not fit the parameters, or the ranks were given different ones.
            RuntimeError: called by part of the ranks only, in `base_iterate` or in the middle of an update.
        """
        self._refuse_at_base_iterate("load_state_dict")
        self.refuse_in_update("load_state_dict()")
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict  # type: ignore[arg-type]
        self._groups.world.meet("load_state_dict()")
        self.synchronize_parameters()
        sharded_state.load_state(self, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

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
        for partition in self._partitions:
            partition.remove()
            for parameter in partition.parameters:
                sharded_arguments.sharded_by.pop(parameter, None)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a ShardedOptimizer cannot be copied or pickled; save its state_dict()")

    def __repr__(self) -> str:
        return f"ShardedOptimizer over {self._groups.shard.size} ranks of {super().__repr__()}"
