"""Compress gradients for Horovod, which reduces no bfloat16 and no complex ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Sent:
    """Hold what `WireFormat.decompress` has to know about a tensor in flight."""

    gradient: Tensor
    copied: bool
    compressed_dtype: torch.dtype
    context: Any


class WireFormat:
    """Wrap a Horovod compression for every dtype and layout of gradients.

    - bfloat16 travels and is reduced in float32, rounded once on arrival; complex numbers as pairs of real ones;
    - a gradient that is not contiguous (channels_last) travels as a copy and arrives in its own layout;
    - a sparse gradient is not compressed.

    Args:
        compression: Horovod's, with `compress(tensor)` → (tensor, context) and `decompress(tensor, context)`.
        keep: what travels is a copy in any case where memory is that of the host, and the gradient stays as it is.
    """

    def __init__(self, compression: Any, *, keep: bool = False) -> None:
        self._compression, self._keep = compression, keep

    def compress(self, tensor: Tensor) -> tuple[Tensor, _Sent]:
        """Return a contiguous tensor of a dtype that Horovod reduces, and its context."""
        if tensor.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of layout {tensor.layout} cannot be part of a group: leave groups out, "
                "or use dense gradients"
            )
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        compressed, context = self._compression.compress(real)
        compressed_dtype = compressed.dtype
        if compressed_dtype == torch.bfloat16:
            compressed = compressed.float()
        compressed = compressed.contiguous()
        copied = compressed.data_ptr() != tensor.data_ptr()
        if self._keep and not copied and tensor.device.type == "cpu":
            compressed, copied = compressed.clone(), True
        return compressed, _Sent(tensor, copied, compressed_dtype, context)

    def decompress(self, tensor: Tensor, sent: _Sent | None) -> Tensor:
        """Return the reduced gradient in the dtype, shape and layout that it had."""
        if sent is None:
            return tensor  # a sparse one
        reduced: Tensor = self._compression.decompress(tensor.to(sent.compressed_dtype), sent.context)
        if sent.gradient.is_complex():
            reduced = torch.view_as_complex(reduced)
        if reduced.stride() != sent.gradient.stride():
            reduced = torch.empty_like(sent.gradient).copy_(reduced)
        return reduced
