"""An optimizer whose state exists once in a Horovod job."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from arsg_dist.horovod import sharded_arguments
from arsg_dist.horovod.exchange import choose_reduce_scatter
from arsg_dist.horovod.guards import check_world_size
from arsg_dist.horovod.inner_optimizer import InnerOptimizer
from arsg_dist.horovod.parameter_gather import GatherMode, PendingGather
from arsg_dist.horovod.partition import Exchange, pieces_of_group, shard_groups
from arsg_dist.horovod.same_settings import same_settings
from arsg_dist.horovod.second_sum import CheckedReduceScatter
from arsg_dist.horovod.sharded_gradients import ShardedGradients
from arsg_dist.horovod.sharded_state import ShardedState
from arsg_dist.horovod.state_entries import check_state

# Horovod tells exchanges apart by their names: those of two optimizers must differ, and be the same on every rank. So
# optimizers are counted per set of ranks, each of which makes all of that set.
_made_on: Counter[tuple[int, ...]] = Counter()


class ShardedOptimizer(ShardedGradients, ShardedState):
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
        named_parameters: (name, parameter) pairs with unique names, usually `model.named_parameters()`; also of
            parameters that `add_param_group` will add. None: the names of the groups, or numbers.
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
        ValueError: an argument that cannot be served; Horovod is not initialised or has another number of ranks than
            the launcher; the ranks' parameters, arguments, settings or states differ.
        TypeError: `optimizer` is not a torch optimizer, or not known to work element by element.
        JobError: another rank raised one of these.
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
        check_world_size(whole_job=False)
        self._elastic = sharded_arguments.in_elastic_job()
        if self._elastic:
            sharded_arguments.check_elastic(shard_group, process_set)
        sharded_arguments.check_process_set(process_set)
        self._shard_group, self.process_set = shard_group, process_set
        ranks = tuple(process_set.ranks)
        _made_on[ranks] += 1
        self._groups = shard_groups(shard_group, process_set, f"sharded{_made_on[ranks]}")
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
            given = sharded_arguments.given_names(named_parameters)
            self._names = given or {}
            named = sharded_arguments.names_of(optimizer.param_groups, given)
            sharded_arguments.check_parameters(named)
            if not any(parameter.requires_grad for _, parameter in named):
                raise ValueError("no parameter of the optimizer requires a gradient")
            check_state(named, optimizer)
            self._exchange_between = lambda groups: Exchange(
                CheckedReduceScatter(
                    choose_reduce_scatter(reduce_scatter, groups.shard, named[0][1].device.type)
                ),
                compression,
                prescale=1.0 / gradient_predivide_factor,
                postscale=gradient_predivide_factor / (groups.world.size if op == hvd.Average else 1),
                sparse_as_dense=sparse_as_dense,
            )
            self._exchange = self._exchange_between(self._groups)
        self._bucket_bytes = int(bucket_mb * 2**20)
        self.backward_passes_per_step = backward_passes_per_step
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._trained = []
        self._partitions = []
        self._pending = PendingGather(gather)
        self._frozen = []
        self._whole_state = dict(optimizer.state)
        self._inner = InnerOptimizer(optimizer, self)
        # Not a method of this object: without circles it is freed as soon as it is dropped.
        self._inner.pieces_of_group = functools.partial(pieces_of_group, self._partitions)
        self._add(named)
        self._ready = True

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
                memory was replaced; if the ranks have different settings (lr, ...); at the first update, if they have
                different parameters.
        """
        self._refuse_at_base_iterate("step")
        self._require_layout("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._should_synchronize and not all(p.gradients.synchronized for p in self._partitions):
            raise RuntimeError("step() in skip_synchronize(): call synchronize() before it")
        world = self._groups.world
        with same_settings(self, world.process_set, world.name):
            self.synchronize()
        self._bring_masters_up_to_date()
        for partition in self._partitions:
            partition.hand_out_gradients()
        self._inner.step()
        for partition in self._partitions:
            partition.take_gradients_back()
            partition.start_gather()
        return loss

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

    def restart(self) -> None:
        """`ARSG.restart`.

        Raises:
            TypeError: the optimizer has no restart.
        """
        self._inner.require("restart")
        self._require_layout("restart()")
        with self._inner.on_pieces() as optimizer:
            optimizer.restart()  # type: ignore[attr-defined]

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of new parameters, between updates; every rank must call it alike.

        Args:
            param_group: as of torch. Parameters have their name in `named_parameters` if they were in it, else that of
                a (name, parameter) pair, else a number.

        Raises:
            ValueError: the group does not fit, or the ranks add different ones; no rank has it then.
            JobError: another rank raised ValueError.
            RuntimeError: some backward passes of an update are done.
        """
        if not self._ready:
            super().add_param_group(param_group)
            return
        self._refuse_at_base_iterate("add_param_group")
        if any(partition.gradients.under_way for partition in self._partitions):
            raise RuntimeError("add_param_group() is for between updates: after step() and zero_grad()")
        index = len(self.param_groups)
        try:
            with self._fail_together():
                # The base class of the inner optimizer checks its settings; both share the list of groups.
                self._inner.optimizer.add_param_group(param_group)
                named = sharded_arguments.names_of_group(self.param_groups[index], index, self._names)
                taken = {name for part in (*self._trained, self._frozen) for name, _ in part}
                if twice := taken & {name for name, _ in named}:
                    raise ValueError(f"param_names are taken by other parameters: {', '.join(sorted(twice))}")
                sharded_arguments.check_parameters(named)
            self._add(named)
        except BaseException:
            del self.param_groups[index:]
            raise
        self._started_equal = False

    def __repr__(self) -> str:
        return f"ShardedOptimizer over {self._groups.shard.size} ranks of {super().__repr__()}"
