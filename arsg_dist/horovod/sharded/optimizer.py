"""Partition gradients, optimizer state and fp32 masters across Horovod ranks."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import horovod.torch as hvd
import torch
from torch import Tensor

from arsg_dist.engine import all_finite
from arsg_dist.horovod.comm.collectives import choose_reduce_scatter
from arsg_dist.horovod.comm.environment import check_world_size, in_elastic_job
from arsg_dist.horovod.comm.interface import HorovodOptimizer, check_passes
from arsg_dist.horovod.comm.process_groups import ShardGroups, shard_groups
from arsg_dist.horovod.comm.settings_check import same_settings
from arsg_dist.horovod.comm.verification import CheckedReduceScatter
from arsg_dist.horovod.sharded import arguments
from arsg_dist.horovod.sharded.gather import GatherMode
from arsg_dist.horovod.sharded.gradients import Reduction, ReleasedGradient
from arsg_dist.horovod.sharded.inner_optimizer import InnerOptimizer, check_state
from arsg_dist.horovod.sharded.parameters import ShardedParameters
from arsg_dist.horovod.sharded.state_dict import gather_state, load_state
from arsg_dist.optim.base_iterate import refuse_at_base_iterate

# Horovod tells exchanges apart by their names: those of two optimizers must differ, and be the same on every rank. So
# optimizers are counted per set of ranks, each of which makes all of that set.
_made_on: Counter[tuple[int, ...]] = Counter()


class ShardedOptimizer(HorovodOptimizer):
    """Divide optimizer state and fp32 masters among the ranks of a Horovod job.

    Stands in for `hvd.DistributedOptimizer`.

    A rank owns 1/world_size of every bucket of parameters. Gradients are reduced to their owners while the backward
    pass goes on, owners update their part with `optimizer`, and the parameters are gathered in place on all ranks
    while the program goes on; `arsg_dist.horovod.sharded.gather` says who waits for them.

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
        reduce_scatter: "auto", "alltoall" or "reducescatter"; see `arsg_dist.horovod.comm.collectives`.
        element_wise: says that an optimizer of another class does update each element by itself.

    Attributes:
        shards: the parameters, and how they are divided.
        inner: the optimizer that updates this rank's pieces.
        process_set: as given.
        shard_group: as given.

    Raises:
        ValueError: an argument that cannot be served; Horovod is not initialised or has another number of ranks than
            the launcher; the ranks' parameters, arguments, settings or states differ.
        TypeError: `optimizer` is not a torch optimizer, or not known to work element by element.
        JobError: another rank raised one of these.
        RuntimeError: the exchanges return wrong data here.
    """

    _at_base_iterate = False
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
        if in_elastic_job():
            arguments.check_elastic(shard_group, process_set)
        arguments.check_process_set(process_set)
        self.shard_group, self.process_set = shard_group, process_set
        ranks = tuple(process_set.ranks)
        _made_on[ranks] += 1
        among = shard_groups(shard_group, process_set, f"sharded{_made_on[ranks]}")
        with among.fail_together():
            arguments.check_optimizer(optimizer, element_wise)
            arguments.check_arguments(
                compression,
                backward_passes_per_step,
                op,
                gradient_predivide_factor,
                num_groups or groups,
                bucket_mb,
                gather,
            )
            given = arguments.given_names(named_parameters)
            self._names = given or {}
            named = arguments.names_of(optimizer.param_groups, given)
            arguments.check_parameters(named)
            if not any(parameter.requires_grad for _, parameter in named):
                raise ValueError("no parameter of the optimizer requires a gradient")
            check_state(named, optimizer)
            device = named[0][1].device.type

            def reduction_between(groups: ShardGroups) -> Reduction:
                return Reduction(
                    CheckedReduceScatter(choose_reduce_scatter(reduce_scatter, groups.shard, device)),
                    compression,
                    prescale=1.0 / gradient_predivide_factor,
                    postscale=gradient_predivide_factor / (groups.world.size if op == hvd.Average else 1),
                    sparse_as_dense=sparse_as_dense,
                )

            self.shards = ShardedParameters(
                among, reduction_between, int(bucket_mb * 2**20), backward_passes_per_step, gather
            )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        # Nothing here refers to this object: without circles it is freed as soon as it is dropped.
        self.inner = InnerOptimizer(optimizer, self, self.shards.pieces_of_group)
        self.shards.add(named, self.inner)
        self._ready = True

    @property
    def backward_passes_per_step(self) -> int:
        """Backward passes whose gradients are added up for an update."""
        return self.shards.passes

    @property
    def shard_world_size(self) -> int:
        """Among how many ranks the state is divided."""
        return self.shards.groups.shard.size

    @property
    def _parameter_names(self) -> dict[Tensor, str]:
        """Parameter → name, as Horovod calls what its users read."""
        return self.shards.names

    def _refuse_at_base_iterate(self, what: str) -> None:
        refuse_at_base_iterate(self._at_base_iterate, what)

    # Gradients

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes make an update.

        Raises:
            ValueError: not an integer > 0.
            RuntimeError: some backward passes of an update are done.
        """
        check_passes(passes)
        if self.shards.in_update:
            raise RuntimeError(
                "set_backward_passes_per_step() is for between updates: after step(), before backward()"
            )
        self.shards.passes = passes
        for partition in self.shards.partitions:
            partition.gradients.passes = passes

    def synchronize(self) -> None:
        """Wait until this rank has its part of every reduced gradient. Collective.

        Raises:
            RuntimeError: there are no gradients but those that the update before has used up.
        """
        self.shards.require_layout("synchronize()")
        if not any(partition.gradients.under_way for partition in self.shards.partitions) and any(
            isinstance(parameter.grad, ReleasedGradient) for parameter in self.shards.names
        ):
            raise RuntimeError(
                "the gradients of the update before are used up, and cannot serve another step(): make a backward "
                "pass for each, and call optimizer.zero_grad() before it, also on a rank that makes none"
            )
        for partition in self.shards.partitions:
            partition.gradients.synchronize()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, also of an update that was synchronized and not made.

        Args:
            set_to_none: False fills `.grad` with zeros, which costs the memory of all gradients.

        Raises:
            RuntimeError: after a backward pass and before `synchronize()` or `step()`.
        """
        for partition in self.shards.partitions:
            if partition.gradients.under_way and not partition.gradients.synchronized:
                raise RuntimeError(
                    "zero_grad() after backward() and before step(): other ranks already add up these gradients; to "
                    "throw an update away call synchronize() first, on every rank"
                )
            partition.take_gradients_back()
        # Not by way of `param_groups`, which would wait for the parameters of the last update.
        for parameter in self.shards.names:
            parameter.grad = None if set_to_none else torch.zeros_like(parameter)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        parameters: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Clip the reduced gradients, as torch's `clip_grad_norm_`. Collective.

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
        partitions, group = self.shards.partitions, self.shards.groups.shard
        chosen = None if parameters is None else {id(parameter) for parameter in parameters}
        gradients = [
            partition.gradients.shard(segment.bucket).narrow(0, segment.start, segment.numel)
            for partition in partitions
            for segment, _ in partition.pieces
            if (chosen is None or id(partition.parameters[segment.parameter]) in chosen)
            and partition.parameters[segment.parameter].requires_grad
        ]
        largest = norm_type == float("inf")
        # In fp64, so that the norm hardly depends on where parameters are cut.
        mine = torch.zeros((), dtype=torch.float64, device=partitions[0].parameters[0].device)
        for gradient in gradients:
            norm = torch.linalg.vector_norm(gradient, norm_type, dtype=torch.float64)
            mine = torch.maximum(mine, norm) if largest else mine + norm**norm_type
        total = group.max(mine, "norm") if largest else group.sum(mine, "norm") ** (1.0 / norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(f"the norm of order {norm_type} of the gradients is {float(total)}")
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)
        return total.to(torch.float32)

    def gradient_is_finite(self) -> bool:
        """Tell whether the reduced gradient is finite, the same on all ranks. Collective."""
        self.synchronize()
        held = [shard for p in self.shards.partitions for shard in p.gradients.shards if shard is not None]
        bad = torch.tensor([float(not all_finite(held))])
        return not self.shards.groups.shard.max(bad, "nonfinite").item()

    def check_sums(self, on: bool) -> None:
        """Reduce gradients twice from the next backward pass on, or not. Collective.

        `comm.verification` says how.
        """
        self.shards.reduction.reduce_scatter.checking = on

    def faulty_sums(self) -> list[str]:
        """Return what `check_sums` found since the last call. Collective."""
        return self.shards.reduction.reduce_scatter.faults()

    # The update

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make an update; parameters arrive on the other ranks meanwhile. Collective.

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
        self.shards.require_layout("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        partitions = self.shards.partitions
        if not self._should_synchronize and not all(p.gradients.synchronized for p in partitions):
            raise RuntimeError("step() in skip_synchronize(): call synchronize() before it")
        world = self.shards.groups.world
        with same_settings(self, world.process_set, world.name):
            self.synchronize()
        self.shards.update_masters()
        for partition in partitions:
            partition.hand_out_gradients()
        self.inner.step()
        for partition in partitions:
            partition.take_gradients_back()
            partition.start_gather()
        return loss

    def synchronize_parameters(self) -> None:
        """Wait for the last update's parameters; to read them past their modules."""
        self.shards.pending.wait()

    # Points

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Move parameters to θ inside, and bit by bit back to x afterwards. Collective.

        As `ARSG.base_iterate`.

        Raises:
            TypeError: the optimizer has no base iterate.
            RuntimeError: nested use, or `step` or `load_state_dict` inside.
        """
        self.inner.require("base_iterate")
        self._refuse_at_base_iterate("base_iterate")
        self.shards.require_layout("base_iterate()")
        self.shards.groups.world.meet("base_iterate()")
        self.shards.update_masters()
        with self.inner.on_pieces() as optimizer:
            inner = optimizer.base_iterate()  # type: ignore[attr-defined]
            inner.__enter__()
        self._at_base_iterate = True
        try:
            self.shards.publish_masters()
            yield
        finally:
            inner.__exit__(None, None, None)
            self.shards.publish_masters()
            self._at_base_iterate = False

    def restart(self) -> None:
        """Restart as `ARSG.restart`.

        Raises:
            TypeError: the optimizer has no restart.
        """
        self.inner.require("restart")
        self.shards.require_layout("restart()")
        with self.inner.on_pieces() as optimizer:
            optimizer.restart()  # type: ignore[attr-defined]

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of new parameters, alike on every rank, between updates. Collective.

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
        if self.shards.in_update:
            raise RuntimeError("add_param_group() is for between updates: after step() and zero_grad()")
        index = len(self.param_groups)
        try:
            with self.shards.groups.fail_together():
                # The base class of the inner optimizer checks its settings; both share the list of groups.
                self.inner.optimizer.add_param_group(param_group)
                named = arguments.names_of_group(self.param_groups[index], index, self._names)
                if twice := {*self.shards.names.values()} & {name for name, _ in named}:
                    raise ValueError(f"param_names are taken by other parameters: {', '.join(sorted(twice))}")
                arguments.check_parameters(named)
            self.shards.add(named, self.inner)
        except BaseException:
            del self.param_groups[index:]
            raise

    # State

    def state_dict(self) -> dict[str, Any]:
        """Gather the whole state, as of the unsharded optimizer, on rank 0. Collective.

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
        """Gather as `state_dict`, on every rank if `everywhere`. Collective."""
        self._refuse_at_base_iterate("state_dict")
        self.shards.require_layout("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self.shards.groups.world.meet("state_dict()")
        self.shards.update_masters()
        state = gather_state(self.shards, self.inner, everywhere=everywhere)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:  # type: ignore[override]
        """Load a `state_dict`, of this class or of the unsharded optimizer. Collective.

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
        self.shards.refuse_in_update("load_state_dict()")
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict  # type: ignore[arg-type]
        self.shards.groups.world.meet("load_state_dict()")
        self.synchronize_parameters()
        load_state(self.shards, self.inner, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # Ranks that come and go

    def abandon_layout(self) -> None:
        """Forget the layout and the update under way, without a message to other ranks.

        Those may be dead. The parameters may hold anything if exchanges were under way. State is lost: `reshard`
        brings it back.
        """
        self.shards.abandon()
        self.inner.forget_state()
        self._should_synchronize, self._at_base_iterate = True, False

    def reshard(self, state: dict[str, Any], label: str) -> None:
        """Divide parameters and state among the ranks there are now. Collective.

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
        self.shards.regroup(shard_groups(self.shard_group, self.process_set, label))
        self.inner.whole_state = {}
        try:
            self.shards.lay_out(self.inner)
            load_state(self.shards, self.inner, state)
        except BaseException:
            self.abandon_layout()
            raise

    def close(self) -> None:
        """Take the hooks off the parameters and their modules.

        The parameters stay as they are, on this rank.
        """
        self.shards.close()

    def __repr__(self) -> str:
        return f"ShardedOptimizer over {self.shard_world_size} ranks of {super().__repr__()}"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a ShardedOptimizer cannot be copied or pickled; save its state_dict()")
