"""Keep moments in 8 bits per element, with one exponent per block of 2,048.

    m   ± c⁴·16ᵏ    c up to 127, rounded stochastically
    v     c⁴·16ᵏ    c up to 255, rounded stochastically
    v̂     c⁴·16ᵏ    c up to 255, rounded up

k is the least exponent with which the block's largest element fits. The spacing, relative to an element x where the
largest is X, is about (X/x)^¼ · 4/c of X: 3 to 6 % of the largest m and half of that of v, 5 times that of elements
that are 1/600 of the largest; the least number above 0 is 10⁻⁸ to 10⁻⁷ (m), 2·10⁻¹⁰ to 4·10⁻⁹ (v) of the largest. What
this form is for:

- The numbers of a smaller k contain those of a larger one. So an element that does not change is not rounded again when
  its block's largest one does: a v̂ that is rounded up would creep otherwise, and an m get noise in every update.
- Rounding to nearest would leave m where it is, for with β1 = 0.999 an update moves it by less than half the spacing.
- A number that was stored is stored again exactly. So float32 values are all that a checkpoint needs, and a run that
  goes on with the same blocks goes on with the same bits. (Blocks cut otherwise, on other ranks, round again.)
- Everything is an IEEE operation on float32 or one on integers: kernels can have the same bits.

A block that would hold infinity or NaN is NaN as a whole. What is smaller than 2⁻¹²⁰ is 2⁻¹²⁰ or 0 (blocks without an
element of 2⁻⁹² are coarser). Blocks are counted in the order of memory, from the tensor's first element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from arsg_dist.optim.kernels import rounding
from arsg_dist.optim.kernels.rounding import (
    EXP_AVG_SLOT,
    EXP_AVG_SQ_SLOT,
    MAX_EXP_AVG_SQ_SLOT,
    memory_index,
    random_bits,
)

BLOCK: Final = 2048
"""Elements that share an exponent."""
NOT_FINITE: Final = -128
"""In place of the exponent, of a block that is NaN."""
SLOTS: Final = {
    "exp_avg": EXP_AVG_SLOT,
    "exp_avg_sq": EXP_AVG_SQ_SLOT,
    "max_exp_avg_sq": MAX_EXP_AVG_SQ_SLOT,
}
"""Which form the moments have."""

SIGNED_TOP: Final = 0x4D7817E0
"""Bits of 127⁴ in float32."""
UNSIGNED_TOP: Final = 0x4F7C05FC
"""Of 255⁴."""

_INFINITY: Final = 0x7F800000


class EightBit(Tensor):
    """A moment in 8 bits per element; to torch a float32 tensor.

    What is done with it is done with its values in float32, and what is written into it is rounded: m and v to
    nearest, v̂ up. A view is a copy, so writing into a view changes nothing. Pickled it is the plain float32 tensor.

    Args:
        codes: ±c int8 for m, else c uint8; dense.
        exponents: k of every block, int8.
        slot: which moment it is (see `rounding`).

    Attributes:
        codes: as given.
        exponents: as given.
        slot: as given.
    """

    codes: Tensor
    exponents: Tensor
    slot: int

    @staticmethod
    def __new__(cls, codes: Tensor, exponents: Tensor, slot: int) -> EightBit:
        """Make a tensor without memory of its own."""
        moment: EightBit = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.shape, strides=codes.stride(), dtype=torch.float32, device=codes.device
        )
        moment.codes, moment.exponents, moment.slot = codes, exponents, slot
        return moment

    @staticmethod
    def zeros_like(tensor: Tensor, slot: int) -> EightBit:
        """Return a moment of zeros, in the layout of a tensor."""
        dtype = torch.int8 if slot == EXP_AVG_SLOT else torch.uint8
        codes = torch.zeros_like(
            tensor, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
        )
        blocks = -(-tensor.numel() // BLOCK)
        return EightBit(codes, torch.zeros(blocks, dtype=torch.int8, device=tensor.device), slot)

    def float32(self) -> Tensor:
        """Return the values in a plain tensor of the same layout."""
        scales = ((127 + 4 * self.exponents.to(torch.int32)) << 23).view(torch.float32)
        scales = torch.where(self.exponents == NOT_FINITE, float("nan"), scales)
        c = _blocks(_in_memory_order(self.codes).to(torch.float32))
        powers = _fourth_power(c)
        values = (torch.where(c < 0, -powers, powers) * scales[:, None]).flatten()[: self.codes.numel()]
        return values.as_strided(self.codes.shape, self.codes.stride())

    def store(self, value: Tensor, step: int | Tensor | None = None, first: int = 0) -> None:
        """Round float32 values and keep them.

        Args:
            value: of this shape, any layout.
            step: t of the update, for stochastic rounding of m and v; None rounds them to nearest.
            first: position of the first element in the memory of the whole parameter, for the same.
        """
        signed = self.slot == EXP_AVG_SLOT
        top, highest = (SIGNED_TOP, 127) if signed else (UNSIGNED_TOP, 255)
        laid = torch.empty_strided(
            self.codes.shape, self.codes.stride(), dtype=torch.float32, device=self.codes.device
        )
        laid.copy_(value)
        blocks = _blocks(_in_memory_order(laid))
        largest = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(1) if len(blocks) else self.exponents.int()
        exponents = ((largest - top + 0x1FFFFFF) >> 25).clamp_(
            min=-30
        )  # 16 times as much is 2²⁵ more in bits
        inverse = ((127 - 4 * exponents) << 23).view(torch.float32)
        finite = (largest < _INFINITY)[:, None]
        y = torch.where(finite, blocks.abs() * inverse[:, None], 0.0)
        low = y.sqrt().sqrt_().floor_()
        power = _fourth_power(low)
        if self.slot == MAX_EXP_AVG_SQ_SLOT:
            up = power < y
        else:
            u: float | Tensor = 0.5
            if step is not None:
                index = _blocks(_in_memory_order(memory_index(self.codes, first)))
                u = (2 * random_bits(index, step, self.slot) + 1) * 2.0**-17
            up = u * (_fourth_power(low + 1) - power) < y - power
        c = (low + up).clamp_(max=highest)
        if signed:
            c = torch.where(blocks < 0, -c, c)
        _in_memory_order(self.codes).copy_(c.flatten()[: self.codes.numel()])
        self.exponents.copy_(torch.where(finite[:, 0], exponents, NOT_FINITE))

    def moved(self, change: Callable[[Tensor], Tensor]) -> EightBit:
        """Return one whose two tensors are changed, as to another device."""
        return EightBit(change(self.codes), change(self.exponents), self.slot)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Do with the values what is asked for; keep the form where nothing but place or owner changes."""
        kwargs = kwargs or {}
        kept = _kept(func, args, kwargs)
        if kept is not None:
            return kept
        plain: dict[int, tuple[EightBit, Tensor]] = {}

        def value_of(argument: Any) -> Any:
            if not isinstance(argument, EightBit):
                return argument
            return plain.setdefault(id(argument), (argument, argument.float32()))[1]

        result = func(*tree_map(value_of, args), **tree_map(value_of, kwargs))
        if func._schema.is_mutable:
            written = {id(value): moment for moment, value in plain.values()}
            for moment, value in plain.values():
                moment.store(value)
            return tree_map(lambda returned: written.get(id(returned), returned), result)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the values: readable anywhere, and nothing is lost (see the module)."""
        value: Any = self.float32().cpu()
        return value.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> EightBit:
        """Copy the form as it is."""
        copied = memo[id(self)] = self.moved(Tensor.clone)
        return copied

    def __repr__(self) -> str:  # type: ignore[override]
        """Say what it stands for."""
        return f"EightBit({self.float32()!r})"


def store_rounded(target: Tensor, value: Tensor, step: int | Tensor, slot: int, first: int = 0) -> None:
    """Write `value` into the moment `target`, rounded stochastically where it has fewer bits (v̂ in 8 bits: up).

    Args:
        target: the stored moment, `EightBit`, bfloat16 or as precise as `value`; changed in place.
        value: float32 or float64, of the same shape.
        step: t of this update, a Python int or a 0-dim float32 tensor on `target`'s device.
        slot: which moment (`EXP_AVG_SLOT`, `EXP_AVG_SQ_SLOT`, `MAX_EXP_AVG_SQ_SLOT`).
        first: position of its first element in the memory of the whole parameter.
    """
    if isinstance(target, EightBit):
        target.store(value, step, first)
    elif target.dtype == torch.bfloat16:
        index = memory_index(target, first)
        target.copy_(rounding.round_stochastically(value.float(), index, step, slot))
    elif target is not value:
        target.copy_(value)


def plain(tensor: Tensor) -> Tensor:
    """Return a moment in 8 bits as float32; others as they are."""
    return tensor.float32() if isinstance(tensor, EightBit) else tensor


def _kept(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the result of a function that leaves the form as it is; None for others."""
    aten, first = torch.ops.aten, args[0] if args else None
    if not isinstance(first, EightBit):
        return None
    if func in (aten.detach.default, aten.alias.default) or (
        func is aten.view.default and tuple(args[1]) == tuple(first.shape)
    ):
        return first.moved(lambda part: part)
    if func is aten.clone.default:
        return first.moved(Tensor.clone)
    if func is aten._to_copy.default and kwargs.get("dtype") in (None, torch.float32):
        device, waits = kwargs.get("device"), not kwargs.get("non_blocking", False)
        return first.moved(lambda part: part.to(device, non_blocking=not waits, copy=True))
    if func is aten.copy_.default:
        source = args[1]
        alike = (
            isinstance(source, EightBit)
            and source.slot == first.slot
            and (source.shape, source.stride()) == (first.shape, first.stride())
        )
        if alike:
            first.codes.copy_(source.codes)
            first.exponents.copy_(source.exponents)
        else:
            first.store(plain(source).expand(first.shape))
        return first
    return None


def _fourth_power(c: Tensor) -> Tensor:
    square = c * c
    return square * square


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor as they lie in memory, 1-D, sharing it."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _blocks(flat: Tensor) -> Tensor:
    """Return elements in blocks, the last one filled up with zeros."""
    missing = -len(flat) % BLOCK
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK)
