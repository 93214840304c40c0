"""All-gather parameters, and make everybody who reads them wait."""

import atexit
import functools
import gc
import sys
import time
import weakref
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from contextlib import suppress
from typing import Any, Literal

import horovod.torch as hvd
import torch
import torch._dynamo.callback
import torch._dynamo.utils
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops
from torch import Tensor, nn

from arsg_dist.horovod.comm.collectives import BufferPool, Started, start_all_gather
from arsg_dist.horovod.comm.process_groups import MEETING_TIMEOUT, Group
from arsg_dist.horovod.sharded.buckets import Layout

GatherMode = Literal["lazy", "eager"]


class PendingGather:
    """Track the pending all-gathers of an optimizer, and make readers wait for them.

    Whoever has to wait owns it: the modules, the lists in `param_groups`, the optimizer. It refers to none of them, so
    it lives as long as the last one: the parameters of a model whose optimizer is gone are waited for all the same.

    "lazy": an exchange goes on after the optimizer's `step` returns. Waited for, parameter by parameter, are a forward
    pass of the module that owns the parameter and every access through a module: `module.weight`, `parameters()`,
    `state_dict()`, a deep copy. A parameter that is owned by no module, and all parameters once `torch.compile` is in
    use (compiled code reads memory directly), are waited for in `step`. Going through `optimizer.param_groups` waits
    for all (`WatchedList`). References kept elsewhere (lists made before) cannot be watched: call `wait` first.

    "eager": `step` returns when the parameters are there.

    A copy, such as a deep copy of a module makes with the module's hooks, waits for nothing.

    Args:
        mode: see above.
    """

    def __init__(self, mode: GatherMode = "lazy") -> None:
        self.lazy = mode == "lazy"
        self.started: dict[str, Started] = {}
        """Exchanges under way, by name."""
        self._exchanges_of: dict[int, Sequence[str]] = {}
        self._watched: list[tuple[weakref.ref[nn.Module], Any]] = []
        self._stop_watching_compiler: Callable[[], Any] | None = None
        weakref.finalize(self, _leave_behind, self.started).atexit = False
        _alive.add(self)

    def watch(self, exchanges_of: Mapping[int, Sequence[str]]) -> set[str]:
        """Make readers of further parameters wait.

        Args:
            exchanges_of: id of a parameter → names of the exchanges that fill it.

        Returns:
            Exchanges for which nobody would wait: whoever starts them must.
        """
        self._exchanges_of.update(exchanges_of)
        if not self.lazy:
            return {name for names in exchanges_of.values() for name in names}
        watched = set[int]()
        # The owners, without asking for the model: Horovod's users give parameters only.
        for module in [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]:
            owned = module.__dict__.get("_parameters")
            if not owned:
                continue
            plain = owned.plain() if isinstance(owned, _WatchedParameters) else owned
            if mine := {id(parameter) for parameter in plain.values()} & exchanges_of.keys():
                self._watch_module(module)
                watched |= mine
        self._watch_compiler()
        return {name for parameter in exchanges_of.keys() - watched for name in exchanges_of[parameter]}

    def concerns(self, parameters: Iterable[Tensor]) -> bool:
        """Tell whether readers of one of the parameters wait for it."""
        return any(id(parameter) in self._exchanges_of for parameter in parameters)

    def wait(self) -> None:
        """Return when all parameters are there."""
        self.finish(list(self.started))

    def wait_for(self, parameters: Iterable[Tensor | None]) -> None:
        """Return when these parameters are there; others are ignored."""
        if self.started:
            for parameter in parameters:
                self.finish(self._exchanges_of.get(id(parameter), ()))

    def finish(self, names: Iterable[str]) -> None:
        """Return when these exchanges have ended.

        Raises:
            HorovodInternalError: one failed; again for everybody who waits for it.
        """
        for name in names:
            started = self.started.get(name)
            if started is not None:
                started.finish()
                self.started.pop(name, None)

    def close(self) -> None:
        """Wait, and give the modules back as they were."""
        self.wait()
        self.abandon()

    def abandon(self) -> None:
        """Give the modules back as they were, and wait for nothing."""
        self.started.clear()
        self._exchanges_of.clear()
        for reference, hook in self._watched:
            hook.remove()
            module = reference()
            owned = module.__dict__["_parameters"] if module is not None else None
            if module is not None and isinstance(owned, _WatchedParameters):
                owned.pending[:] = [other for other in owned.pending if other is not self]
                if not owned.pending:
                    module.__dict__["_parameters"] = owned.plain()
        self._watched.clear()
        if self._stop_watching_compiler is not None:
            self._stop_watching_compiler()
            self._stop_watching_compiler = None

    def _watch_module(self, module: nn.Module) -> None:
        owned = module.__dict__["_parameters"]
        if not isinstance(owned, _WatchedParameters):
            module.__dict__["_parameters"] = owned = _WatchedParameters(owned)
        if self not in owned.pending:
            owned.pending.append(self)
            hook = module.register_forward_pre_hook(functools.partial(_before_forward, self), prepend=True)
            self._watched.append((weakref.ref(module), hook))

    def _watch_compiler(self) -> None:
        if self._stop_watching_compiler is not None:
            return
        me = weakref.ref(self)  # torch keeps its callbacks for ever

        def on_compile(_: Any) -> None:
            pending = me()
            if pending is not None:
                pending.lazy = False
                pending.wait()

        handler = torch._dynamo.callback.callback_handler
        handler.register_start_callback(on_compile)
        stop = weakref.finalize(self, handler.remove_start_callback, on_compile)
        stop.atexit = False
        self._stop_watching_compiler = stop
        if torch._dynamo.utils.counters["frames"]["total"]:
            self.lazy = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PendingGather, ()


class ParameterGather:
    """All-gather buckets into the parameters.

    Args:
        layout: of the parameters.
        parameters: as in the layout.
        arenas: the flat memory of the parameters.
        group: the ranks.
        pending: makes readers wait.
        pool: memory of what is sent.
        label: precedes the names of buckets.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Sequence[Tensor],
        arenas: Sequence[Tensor],
        group: Group,
        pending: PendingGather,
        pool: BufferPool,
        label: str,
    ) -> None:
        self.layout, self.group, self.pending, self._pool = layout, group, pending, pool
        self._names = [f"{label}.parameters{bucket}" for bucket in range(len(layout.buckets))]
        self._targets = [
            arenas[bucket.arena].narrow(0, bucket.start, bucket.numel) for bucket in layout.buckets
        ]
        self._unwatched = pending.watch(
            {
                id(parameter): sorted(
                    {self._names[segment.bucket] for segment in layout.segments_of_parameter(index)}
                )
                for index, parameter in enumerate(parameters)
            }
        )
        # After Horovod's own, which was registered when it was initialised, so that it is called before.
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)

    def bucket(self, bucket: int) -> Tensor:
        """Return the memory of a bucket's parameters."""
        return self._targets[bucket]

    def start(self, shards: Sequence[Tensor]) -> None:
        """Begin to all-gather; one shard per bucket, maybe parameter memory. Collective."""
        assert not self.pending.started.keys() & set(self._names)
        for bucket in reversed(
            range(len(shards))
        ):  # the first layers' parameters, needed first, are in the last
            self.pending.started[self._names[bucket]] = start_all_gather(
                self.group, shards[bucket], self._targets[bucket], self._names[bucket], bucket, self._pool
            )
        self.pending.finish(self._unwatched if self.pending.lazy else self._names)


class WatchedList(list[Tensor]):
    """List a group's parameters; finish the pending all-gathers before being read.

    A copy is a plain list.

    Args:
        parameters: of the group.
        wait: returns when the parameters are there.
    """

    def __init__(self, parameters: Iterable[Tensor], wait: Callable[[], None]) -> None:
        super().__init__(parameters)
        self._wait = wait

    def __iter__(self) -> Iterator[Tensor]:
        self._wait()
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        self._wait()
        return super().__getitem__(index)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return list, (list(self),)


def take_over(parameters: Iterable[Tensor]) -> None:
    """Take parameters over from an optimizer that is no more.

    Waits for what it was still sending into them, and gives their modules back.
    """
    parameters = list(parameters)
    for pending in list(_alive):
        if pending.concerns(parameters):
            pending.close()


def finish_gathers() -> None:
    """Finish the pending all-gathers of this rank, also those that only others need.

    To be called before this rank leaves the others, who would otherwise wait for its part in vain. An exchange that
    failed is reported to those who read its parameters, and one that takes more than 300 s is given up.
    """
    if not hvd.is_initialized():
        return
    deadline = time.monotonic() + MEETING_TIMEOUT
    under_way = [(pending, started) for pending in list(_alive) for started in pending.started.values()]
    while not (all(started.done() for _, started in under_way) and not _still_under_way()):
        if time.monotonic() > deadline:
            return
        time.sleep(1e-3)
    for pending in {pending for pending, _ in under_way}:
        with suppress(HorovodInternalError):
            pending.wait()


def _at_exit() -> None:
    if not hasattr(sys, "last_value"):  # after an error that nobody caught the job ends, and must not wait
        finish_gathers()


_alive: weakref.WeakSet[PendingGather] = weakref.WeakSet()
_left_behind: list[tuple[Any, int]] = []
"""Exchanges for which nobody on this rank waits: Horovod's table (a new one after each `hvd.init`) and its handle."""


def _leave_behind(started: dict[str, Started]) -> None:
    """Note exchanges whose parameters nobody can read any more.

    Does not wait, since it is called anywhere.
    """
    _still_under_way()
    _left_behind.extend((mpi_ops._handle_map, exchange.handle) for exchange in started.values())
    started.clear()


def _still_under_way() -> bool:
    _left_behind[:] = [
        (table, handle)
        for table, handle in _left_behind
        if table is mpi_ops._handle_map and hvd.is_initialized() and not hvd.poll(handle)
    ]
    return bool(_left_behind)


class _WatchedParameters(dict[str, Any]):
    """Hold a module's `_parameters`; reading one waits until it is there.

    A copy is a plain dict.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.pending: list[PendingGather] = []
        """Of the optimizers that have parameters of the module."""

    def plain(self) -> dict[str, Any]:
        """Return the contents, without waiting."""
        return dict(super().items())

    def _wait(self, parameters: Iterable[Any]) -> None:
        for pending in self.pending:
            if pending.started:
                pending.wait_for(parameters)

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        self._wait((parameter,))
        return parameter

    def get(self, name: str, default: Any = None) -> Any:
        """Read as of dict."""
        parameter = super().get(name, default)
        self._wait((parameter,))
        return parameter

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Read as of dict."""
        self._wait(super().values())
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Read as of dict."""
        self._wait(super().values())
        return super().items()

    def copy(self) -> dict[str, Any]:
        """Copy to a plain dict."""
        return dict(self.items())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.copy(),)


def _before_forward(pending: PendingGather, module: nn.Module, arguments: Any) -> None:
    if torch.compiler.is_compiling():
        return  # the start of the compilation has already waited
    if pending.started:
        pending.wait_for(module.__dict__["_parameters"].values())
