"""Memory that exchanges use again, update after update."""

import torch
from torch import Tensor


class BufferPool:
    """Lends 1-D tensors on the CPU and keeps their memory when they come back.

    The C library returns large blocks to the system, and getting them again page by page costs as much time as the
    exchange they are for. Accelerators' allocators keep memory themselves, so there `take` makes a new tensor.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.UntypedStorage]] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with arbitrary contents."""
        if device.type != "cpu":
            return torch.empty(numel, dtype=dtype, device=device)
        free = self._free.get(numel * dtype.itemsize)
        if not free:
            return torch.empty(numel, dtype=dtype)
        return torch.empty(0, dtype=dtype).set_(free.pop(), 0, (numel,))  # type: ignore[call-overload,no-any-return]

    def give_back(self, tensor: Tensor) -> None:
        """Takes a whole tensor of `take` that nobody reads or writes any more, this process's exchanges included."""
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            self._free.setdefault(storage.nbytes(), []).append(storage)
