"""Detect changes of gradients between `backward()` and the end of their reduction."""

from dataclasses import dataclass

import torch
from torch import Tensor

_LOOKED_AT = 1024


@dataclass(frozen=True, slots=True)
class InFlight:
    """Remember a gradient as it was sent.

    A change meanwhile (clipped, unscaled, replaced) would race with the reduction, or be lost, so it is looked for. Not
    found is one that is made past autograd (`.data`, `numpy()`) in the very memory that Horovod reduces in place, on an
    accelerator.

    Attributes:
        gradient: the tensor.
        version: of it, which autograd counts.
        address: of its memory; None for a sparse one.
        some: some of its elements; None where Horovod writes into them.
    """

    gradient: Tensor
    version: int
    address: int | None
    some: Tensor | None

    @classmethod
    def of(cls, gradient: Tensor, *, copied: bool) -> "InFlight":
        """Remember what is sent now.

        Args:
            gradient: a parameter's.
            copied: Horovod works on a copy, so that the gradient itself stays as it is until the end.
        """
        address = None if gradient.is_sparse else gradient.data_ptr()
        return cls(gradient, gradient._version, address, _some(gradient) if copied else None)

    def changed(self, now: Tensor | None) -> bool:
        """Tell whether what is a parameter's gradient now is another one, or was written."""
        if now is None or now is not self.gradient or now._version != self.version:
            return True
        if self.address is not None and now.data_ptr() != self.address:
            return True
        return self.some is not None and not torch.equal(
            _some(now).view(torch.uint8), self.some.view(torch.uint8)
        )


def _some(gradient: Tensor) -> Tensor:
    """Copy a few elements from all over: whoever scales a gradient changes them all."""
    values = (gradient._values() if gradient.is_sparse else gradient).detach()
    strides = values.stride()
    by_stride = sorted(range(len(strides)), key=lambda dimension: -strides[dimension])
    flat = values.permute(by_stride).reshape(-1)  # a view, whatever the layout
    return flat[:: 1 + flat.numel() // _LOOKED_AT].clone()
