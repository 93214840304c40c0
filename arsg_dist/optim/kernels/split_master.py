"""Keep a bfloat16 parameter's float32 master as the parameter itself and the 16 bits that it lacks.

    parameter = the upper 16 bits of the master's bits + 0x8000      correction = the master's bits − parameter · 2¹⁶

The parameter is the master rounded to nearest, halfway cases away from zero (to even would need a 33rd bit), and both
together are the master exactly, infinity included; a NaN is one with no correction. A parameter that somebody else has
written to keeps its correction, which is at most half of the spacing there.
"""

from __future__ import annotations

import torch
from torch import Tensor

CORRECTION = "correction"
"""Key in the state of a parameter."""


def joined(param: Tensor, correction: Tensor) -> Tensor:
    """Return the master, float32, of a bfloat16 parameter and its int16 correction."""
    bits = (param.view(torch.int16).to(torch.int32) << 16) + correction.to(torch.int32)
    return bits.view(torch.float32)


def split(param: Tensor, correction: Tensor, master: Tensor) -> None:
    """Write a float32 master into both."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    nan = master.isnan()
    param.view(torch.int16).copy_(torch.where(nan, 0x7FC0, upper))
    correction.copy_(torch.where(nan, 0, bits - (upper << 16)))
