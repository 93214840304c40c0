"""The form in which a gradient travels: Horovod reduces no bfloat16, no complex numbers and contiguous tensors only."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Sent:
    """What `WireFormat.decompress` has to know about a tensor in flight."""

    gradient: Tensor
    version: int
    compressed_dtype: torch.dtype
    context: Any


class WireFormat:
    """A Horovod compression around another one, for every dtype and memory layout a gradient can have.

    - bfloat16 travels and is reduced in float32, rounded once on arrival; complex numbers as pairs of real ones;
    - a gradient that is not contiguous (channels_last) travels as a copy and arrives in its own layout;
    - a gradient that was changed between `backward()` and its arrival (clipped, unscaled) is refused: the change would
      race with the reduction, or be lost.

    Args:
        compression: Horovod's, with `compress(tensor)` → (tensor, context) and `decompress(tensor, context)`.
    """

    def __init__(self, compression: Any) -> None:
        self._compression = compression

    def compress(self, tensor: Tensor) -> tuple[Tensor, _Sent]:
        """Returns a contiguous tensor of a dtype that Horovod reduces, and what `decompress` needs."""
        if tensor.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of layout {tensor.layout} cannot be part of a group: leave groups out, "
                "or use dense gradients"
            )
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        compressed, context = self._compression.compress(real)
        sent = _Sent(tensor, tensor._version, compressed.dtype, context)
        if compressed.dtype == torch.bfloat16:
            compressed = compressed.float()
        return compressed.contiguous(), sent

    def decompress(self, tensor: Tensor, sent: _Sent) -> Tensor:
        """Returns the reduced gradient in the dtype, shape and layout that it had.

        Raises:
            RuntimeError: the gradient was changed while it was in flight.
        """
        if sent.gradient._version != sent.version:
            raise RuntimeError(
                "a gradient was changed between backward() and the end of its exchange, which would be lost or reduced "
                "twice: call optimizer.synchronize() before clipping or unscaling gradients, then "
                "'with optimizer.skip_synchronize(): optimizer.step()'"
            )
        reduced: Tensor = self._compression.decompress(tensor.to(sent.compressed_dtype), sent.context)
        if sent.gradient.is_complex():
            reduced = torch.view_as_complex(reduced)
        if reduced.stride() != sent.gradient.stride():
            reduced = torch.empty_like(sent.gradient).copy_(reduced)
        return reduced
