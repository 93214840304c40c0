"""Keep the end of Horovod's background thread from waiting for Python, which may be waiting for that thread.

When a rank dies, the background thread of the others ends and lets go of the tensors in flight while it holds the locks
of its tables. The last reference from C++ to a tensor that Python knows is given back under the interpreter's lock
(PyTorch, "PyObject preservation for Tensor and Storages" in c10/util/intrusive_ptr.h). The main thread holds that one
while it asks for the next operation, and waits for the tables' locks: neither goes on, and the rank hangs instead of
raising HorovodInternalError (Horovod 0.28.1, TensorQueue::FinalizeTensorQueue). With another reference from C++ to each
tensor in flight the background thread's is never the last. What an autograd function saves is one; a view is none where
the tensor is a view itself: it refers to the tensor that both are views of.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from horovod.torch import mpi_ops
from torch import Tensor


class _Save(torch.autograd.Function):
    """Hold tensors as long as what it returns lives."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensors: list[Tensor]) -> Tensor:
        """Return a view of an anchor that requires a gradient."""
        ctx.save_for_backward(*tensors)
        return anchor.view_as(anchor)


def held(tensors: Iterable[Tensor]) -> Tensor:
    """Return what refers to tensors from C++, all but those of inference mode, which nothing can save."""
    savable = [tensor for tensor in tensors if not tensor.is_inference()]
    with torch.inference_mode(False), torch.enable_grad():
        holder: Tensor = _Save.apply(torch.empty(0, requires_grad=True), savable)  # type: ignore[no-untyped-call]
    return holder


class _HeldTensors:
    """Stand in for Horovod's extension module: hold the tensors of each operation, until its end."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension
        self.holders: dict[int, Tensor] = {}
        """Handle → what holds; another dictionary after each shutdown, since handles are then used again."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._extension, name)
        if name == "horovod_torch_wait_and_clear":
            value = self._released_at_the_end(value)
        elif name == "horovod_torch_reset":
            value = self._released_first(value)
        elif "_async" in name:
            value = self._held(value)
        else:
            return value
        setattr(self, name, value)  # found without __getattr__ from now on
        return value

    def _held(self, start: Callable[..., int]) -> Callable[..., int]:
        def started(*arguments: Any) -> int:
            holder = held(_tensors(arguments))
            handle = start(*arguments)
            self.holders[handle] = holder
            return handle

        return started

    def _released_at_the_end(self, wait: Callable[[int], None]) -> Callable[[int], None]:
        def waited(handle: int) -> None:
            wait(handle)  # where it raises, the background thread may still be at its end
            self.holders.pop(handle, None)

        return waited

    def _released_first(self, reset: Callable[[], None]) -> Callable[[], None]:
        def released() -> None:
            self.holders = {}
            reset()

        return released


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def hold_tensors_in_flight() -> None:
    """Hold the tensors of all of Horovod's operations of this process, from now on; once is enough."""
    if not isinstance(mpi_ops.mpi_lib, _HeldTensors):
        mpi_ops.mpi_lib = _HeldTensors(mpi_ops.mpi_lib)


def tables_of_handles() -> list[dict[int, Any]]:
    """Return what keeps the tensors of this process's operations, by handle, until somebody waits for them."""
    tables = [mpi_ops._handle_map]
    if isinstance(mpi_ops.mpi_lib, _HeldTensors):
        tables.append(mpi_ops.mpi_lib.holders)
    return tables
