"""Round float32 moments to bfloat16 stochastically, yet reproducibly.

bfloat16 keeps 8 significant bits. With β1 = 0.999 a step moves m by about a thousandth of its distance to the
gradient, often less than half the spacing of bfloat16 numbers, so rounding to nearest leaves m where it is (v
and v̂ likewise). Rounding up or down with the right probability keeps the expected value exact.

The random bits come from a counter-based integer hash and not from a generator: replicas of a parameter on
different ranks must make identical updates, a resumed run must repeat itself, and the user's random state
must not be touched. The hash, in 32-bit unsigned arithmetic that wraps around:

    h = index * 0x9E3779B1 + step * 0x85EBCA77 + slot * 0xC2B2AE3D
    h ^= h >> 16;  h *= 0x7FEB352D;  h ^= h >> 15;  h *= 0x846CA68B;  h ^= h >> 16
    addend = h >> 16                                       (16 random bits)
    bfloat16 bits = (float32 bits + addend) >> 16          (finite values; inf and NaN are kept)

`index` is the element's position in memory counted from the stored moment's first element, the sum of
index_k·stride_k: for a contiguous tensor the row-major index, for any dense layout (channels_last) the
position in one linear pass over memory. Of a part of a parameter it is the position in the whole, so it does not depend
on how many ranks divide the update. `step` is the update's number t ≥ 1, `slot` says which moment it is.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

EXP_AVG_SLOT: Final = 0
EXP_AVG_SQ_SLOT: Final = 1
MAX_EXP_AVG_SQ_SLOT: Final = 2

_INDEX_FACTOR: Final = 0x9E3779B1
_STEP_FACTOR: Final = 0x85EBCA77
_SLOT_FACTOR: Final = 0xC2B2AE3D
_MIX_FACTOR_1: Final = 0x7FEB352D
_MIX_FACTOR_2: Final = 0x846CA68B


def round_stochastically(value: Tensor, index: Tensor, step: int | Tensor, slot: int) -> Tensor:
    """Round float32 `value` to bfloat16, with probabilities that keep the mean.

    Args:
        value: float32, any shape.
        index: int32, the shape of `value`: see the module's docstring.
        step: t of this update, a Python int or a 0-dim float32 tensor.
        slot: which moment.

    Returns:
        A bfloat16 tensor of the same shape. Finite values above the largest bfloat16 may become infinite.
    """
    bits = value.view(torch.int32) + random_bits(index, step, slot)
    rounded = (bits & -0x10000).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)


def random_bits(index: Tensor, step: int | Tensor, slot: int) -> Tensor:
    """Return the hash's top 16 bits for every element, as int32 in [0, 65536)."""
    if isinstance(step, Tensor):
        counter: int | Tensor = step.to(torch.int32) * _signed(_STEP_FACTOR) + _signed(slot * _SLOT_FACTOR)
    else:
        counter = _signed(step * _STEP_FACTOR + slot * _SLOT_FACTOR)
    h = index * _signed(_INDEX_FACTOR) + counter
    h = h ^ _shift_right(h, 16)
    h = h * _signed(_MIX_FACTOR_1)
    h = h ^ _shift_right(h, 15)
    h = h * _signed(_MIX_FACTOR_2)
    return _shift_right(h ^ _shift_right(h, 16), 16)


def memory_index(tensor: Tensor, first: int = 0) -> Tensor:
    """Return every element's position in memory, int32 (modulo 2³²), the first one's being `first`."""
    if tensor.numel() == 0:
        return torch.empty(tensor.shape, dtype=torch.int32, device=tensor.device)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    # int64 first: int32 arange refuses tensors of 2³¹ elements and more.
    positions = torch.arange(first, first + extent, device=tensor.device).to(torch.int32)
    return positions.as_strided(tensor.shape, tensor.stride())


def _shift_right(h: Tensor, bits: int) -> Tensor:
    """Shift int32 logically (torch's own shift copies the sign bit)."""
    return (h >> bits) & ((1 << (32 - bits)) - 1)


def _signed(unsigned: int) -> int:
    """Return the int32 with the same low 32 bits."""
    return (unsigned + 0x80000000) % 0x100000000 - 0x80000000
