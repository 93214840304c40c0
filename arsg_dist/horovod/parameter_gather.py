"""Parameters on their way back from their owners, and everybody who has to wait for them."""

import functools
import gc
import weakref
from collections.abc import Callable, ItemsView, Iterable, Sequence, ValuesView
from typing import Any, Literal

import torch
import torch._dynamo.callback
import torch._dynamo.utils
from torch import Tensor, nn

from arsg_dist.horovod.buckets import Layout
from arsg_dist.horovod.buffer_pool import BufferPool
from arsg_dist.horovod.exchange import Started, start_all_gather
from arsg_dist.horovod.group import Group

GatherMode = Literal["lazy", "eager"]


class ParameterGather:
    """All-gathers buckets into the parameters and makes readers wait.

    "lazy": an exchange goes on after `start` returns. Waited for, parameter by parameter, are a forward pass of the
    module that owns the parameter and every access through a module: `module.weight`, `parameters()`,
    `state_dict()`, a deep copy. A parameter that is owned by no module, and all parameters once `torch.compile` is in
    use (compiled code reads memory directly), are waited for in `start`. `optimizer.param_groups` waits by itself
    (`watched_groups`). References kept elsewhere (lists made before) cannot be watched: call `wait` first.

    "eager": `start` returns when the parameters are there.

    Args:
        layout: of the parameters.
        parameters: as in the layout.
        arenas: the flat memory of the parameters.
        group: the ranks.
        mode: see above.
        pool: memory of what is sent.
        label: precedes the names of buckets.
    """

    def __init__(
        self,
        layout: Layout,
        parameters: Sequence[Tensor],
        arenas: Sequence[Tensor],
        group: Group,
        mode: GatherMode,
        pool: BufferPool,
        label: str,
    ) -> None:
        self.label, self._pool = label, pool
        self.layout, self.group, self.lazy = layout, group, mode == "lazy"
        self.started: dict[int, Started] = {}
        """Exchanges under way, by bucket."""
        self._targets = [
            arenas[bucket.arena].narrow(0, bucket.start, bucket.numel) for bucket in layout.buckets
        ]
        self._buckets_of = {
            id(parameter): sorted({segment.bucket for segment in layout.segments_of_parameter(index)})
            for index, parameter in enumerate(parameters)
        }
        self._modules: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._on_compile: Callable[[Any], None] | None = None
        self._unwatched = set(range(len(layout.buckets)))
        if self.lazy:
            self._watch_modules()
            self._watch_compiler()

    def bucket(self, bucket: int) -> Tensor:
        """The memory of a bucket's parameters."""
        return self._targets[bucket]

    def start(self, shards: Sequence[Tensor]) -> None:
        """Begins to send this rank's shards, one per bucket, which may lie in the parameters' memory."""
        assert not self.started
        for bucket in reversed(
            range(len(shards))
        ):  # the first layers' parameters, needed first, are in the last
            self.started[bucket] = start_all_gather(
                self.group,
                shards[bucket],
                self._targets[bucket],
                f"{self.label}.parameters{bucket}",
                bucket,
                self._pool,
            )
        self._wait_for(list(self.started) if not self.lazy else self._unwatched)

    def wait(self) -> None:
        """Returns when all parameters are there."""
        self._wait_for(list(self.started))

    def wait_for(self, parameters: Iterable[Tensor | None]) -> None:
        """Returns when these parameters are there; others are ignored."""
        if self.started:
            for parameter in parameters:
                self._wait_for(self._buckets_of.get(id(parameter), ()))

    def _wait_for(self, buckets: Iterable[int]) -> None:
        for bucket in buckets:
            started = self.started.pop(bucket, None)
            if started is not None:
                started.finish()

    def abandon(self) -> list[Started]:
        """Gives the modules back as they were; returns the exchanges under way, for which nobody waits."""
        started = list(self.started.values())
        self.started = {}
        self.remove()
        return started

    def remove(self) -> None:
        """Waits, and gives the modules back as they were."""
        self.wait()
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            watched = module.__dict__["_parameters"]
            if isinstance(watched, _WatchedParameters):
                module.__dict__["_parameters"] = dict(watched.plain())
        if self._on_compile is not None:
            torch._dynamo.callback.callback_handler.remove_start_callback(self._on_compile)
            self._on_compile = None

    def _watch_modules(self) -> None:
        watched = set()
        # The owners, without asking for the model: Horovod's users give parameters only.
        for module in [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]:
            owned = module.__dict__.get("_parameters")
            if not owned:
                continue
            values = owned.plain().values() if isinstance(owned, _WatchedParameters) else owned.values()
            mine = {id(parameter) for parameter in values} & self._buckets_of.keys()
            if mine:
                module.__dict__["_parameters"] = _WatchedParameters(
                    owned.plain() if isinstance(owned, _WatchedParameters) else owned, weakref.ref(self)
                )
                self._hooks.append(
                    module.register_forward_pre_hook(
                        functools.partial(_before_forward, weakref.ref(self)), prepend=True
                    )
                )
                self._modules.append(module)
                watched |= mine
        unowned = self._buckets_of.keys() - watched
        self._unwatched = {bucket for parameter in unowned for bucket in self._buckets_of[parameter]}

    def _watch_compiler(self) -> None:
        me = weakref.ref(self)

        def on_compile(_: Any) -> None:
            gather = me()
            if gather is not None:
                gather.lazy = False
                gather.wait()

        self._on_compile = on_compile
        torch._dynamo.callback.callback_handler.register_start_callback(on_compile)
        if torch._dynamo.utils.counters["frames"]["total"]:
            self.lazy = False


class _WatchedParameters(dict[str, Any]):
    """A module's `_parameters`: reading one waits until it is there. A copy of it is a plain dict."""

    def __init__(self, parameters: dict[str, Any], gather: "weakref.ref[ParameterGather]") -> None:
        super().__init__(parameters)
        self._gather = gather

    def plain(self) -> dict[str, Any]:
        """The contents, without waiting."""
        return dict(super().items())

    def _wait(self, parameters: Iterable[Any]) -> None:
        gather = self._gather()
        if gather is not None and gather.started:
            gather.wait_for(parameters)

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        self._wait((parameter,))
        return parameter

    def get(self, name: str, default: Any = None) -> Any:
        """As of dict."""
        parameter = super().get(name, default)
        self._wait((parameter,))
        return parameter

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """As of dict."""
        self._wait(super().values())
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """As of dict."""
        self._wait(super().values())
        return super().items()

    def copy(self) -> dict[str, Any]:
        """A plain dict."""
        return dict(self.items())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (self.copy(),)


def _before_forward(gather: "weakref.ref[ParameterGather]", module: nn.Module, arguments: Any) -> None:
    if torch.compiler.is_compiling():
        return  # the start of the compilation has already waited
    waiting = gather()
    if waiting is not None and waiting.started:
        waiting.wait_for(module.__dict__["_parameters"].values())
