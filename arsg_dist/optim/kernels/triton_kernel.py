"""Update every tensor of a list in one launch of one Triton kernel, on CUDA and ROCm.

The kernel reads x, g, m, v, v̂ and writes x, m, v, v̂ once: 36 bytes per element with float32 state, 24 with bfloat16
state, 18 with 8 bits (eight_bit.py; 16 with a bfloat16 gradient and a split master). The tensors are found through a
table of their addresses, cut into chunks; as many programs as fit on the device take chunk after chunk. Chunks that
are full and aligned are read and written 128 bits at a time, the others masked.

Every operation is rounded once, root and quotient correctly, and none is contracted: on float32 parameters the result
has the bits of the CPU kernel (csrc/fused_cpu.cpp), and moments in bfloat16 are rounded with the same random bits (see
rounding.py). Settings are arguments of the compiled code: changing them compiles nothing anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from arsg_dist.optim.hyperparameters import PRECONDITIONERS, Hyperparameters, Steps, bias_correction
from arsg_dist.optim.kernels.eight_bit import BLOCK, SIGNED_TOP, UNSIGNED_TOP, EightBit
from arsg_dist.optim.kernels.foreach import foreach_step

CHUNK: Final = 2048
"""Elements of a chunk: with 256 threads, 128 bits of each bfloat16 tensor for every thread; a block of `EightBit`."""
assert CHUNK == BLOCK
WARPS: Final = 8
WARPS_FOR_EIGHT_BITS: Final = 16
"""Rounding a block takes so many registers that more elements per thread would leave room for one small program."""
PROGRAMS_PER_PROCESSOR: Final = 4

ELEMENTS: Final = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""Dtypes of parameters and gradients."""
MOMENTS: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

_COLUMNS: Final = 10
"""Of the table of addresses: x, g, m, v, v̂, correction, the exponents of m, v, v̂; and the index of the first element in
the whole parameter."""

# Triton's code sees constants only as these; indices in PRECONDITIONERS.
_AMSGRAD = tl.constexpr(0)
_NONE = tl.constexpr(2)
_INDEX_FACTOR = tl.constexpr(0x9E3779B1)
_STEP_FACTOR = tl.constexpr(0x85EBCA77)
_ROW = tl.constexpr(_COLUMNS)
# Bits of the largest c⁴ in float32, of m and of v and v̂ (eight_bit.py).
_SIGNED_TOP = tl.constexpr(SIGNED_TOP)
_UNSIGNED_TOP = tl.constexpr(UNSIGNED_TOP)


# `tl.max` is made of code that was compiled or interpreted as Triton was imported, which tests choose later.
_LARGER = tl.standard._elementwise_max


class KernelUnavailableError(RuntimeError):
    """Say that the kernel cannot run here: no compiler, no driver, a device it is not for."""


def triton_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: Steps,
    *,
    hyper: Hyperparameters,
    corrections: Sequence[Tensor] = (),
    firsts: Sequence[int] = (),
) -> None:
    """Update all parameters in one launch, without synchronising with the device.

    See `StepFunction` for the arguments and `reference.arsg_update` for the rule. Gradients may have another dtype than
    the parameters. Left to `foreach_step` are float64, and parameters with gaps or overlaps in memory, or whose
    gradient or moments are laid out otherwise.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or launched here; nothing was changed.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    for_others = replace(hyper, found_inf=None)  # which they do not know: it is read where they are needed
    eight_bit = isinstance(exp_avgs[0], EightBit)
    if (
        params[0].dtype not in ELEMENTS
        or grads[0].dtype not in ELEMENTS
        or exp_avgs[0].dtype not in MOMENTS
        or max(param.numel() for param in params) > _MOST_ELEMENTS
    ):
        if hyper.found_inf is None or not hyper.found_inf:
            foreach_step(*lists, steps, hyper=for_others, corrections=corrections, firsts=firsts)
        return
    grads = [grad.resolve_neg() for grad in grads]
    moments = [kept for kept in (exp_avgs, exp_avg_sqs, max_exp_avg_sqs) if kept]
    rows = [
        _Row(
            [params[i], grads[i], *(_stored(kept[i]) for kept in moments)],
            corrections[i] if corrections else None,
            [cast(EightBit, kept[i]).exponents for kept in moments] if eight_bit else [],
            firsts[i] if firsts else 0,
        )
        for i in range(len(params))
    ]
    direct = [row.is_direct() for row in rows]
    taken = [i for i, row in enumerate(rows) if direct[i] and row.tensors[0].numel()]
    if taken:
        _launch([rows[i] for i in taken], cast(Steps, [steps[i] for i in taken] if steps else []), hyper)
    left = [i for i in range(len(rows)) if not direct[i]]
    if left and (hyper.found_inf is None or not hyper.found_inf):
        x, g, m, v, v_hat, c = (
            [tensors[i] for i in left] if tensors else [] for tensors in (*lists, corrections)
        )
        foreach_step(
            x, g, m, v, v_hat, cast(Steps, [steps[i] for i in left] if steps else []), hyper=for_others,
            corrections=c, firsts=[firsts[i] for i in left] if firsts else [],
        )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # as every in-place operation: a stale graph is noticed


_MOST_ELEMENTS: Final = CHUNK * (2**31 - 1)  # the numbers of chunks are int32


@dataclass(frozen=True, slots=True)
class _Row:
    """Hold what belongs to one parameter.

    Attributes:
        tensors: x, g and the moments, or their codes.
        correction: of a split master.
        exponents: of moments in 8 bits.
        first: index of the first element in the whole parameter.
    """

    tensors: list[Tensor]
    correction: Tensor | None
    exponents: list[Tensor]
    first: int

    def is_direct(self) -> bool:
        """Say whether all have one dense layout."""
        correction = [self.correction] if self.correction is not None else []
        return _is_direct((*self.tensors, *correction))

    def addresses(self) -> list[int]:
        """Return the row of the table; of x again where there is nothing."""
        nothing = self.tensors[0].data_ptr()
        places = [tensor.data_ptr() for tensor in self.tensors]
        exponents = [tensor.data_ptr() for tensor in self.exponents]
        return [
            *places,
            *[nothing] * (5 - len(places)),
            nothing if self.correction is None else self.correction.data_ptr(),
            *exponents,
            *[nothing] * (3 - len(exponents)),
            self.first,
        ]


def _is_direct(tensors: tuple[Tensor, ...]) -> bool:
    """Say whether tensors have one dense layout."""
    first = tensors[0]
    return torch.ops.aten.is_non_overlapping_and_dense(first) and all(
        tensor.stride() == first.stride() for tensor in tensors
    )


def _stored(moment: Tensor) -> Tensor:
    """Return what a moment's elements are kept in."""
    return moment.codes if isinstance(moment, EightBit) else moment


def _launch(rows: list[_Row], steps: Steps, hyper: Hyperparameters) -> None:
    param, grad, exp_avg = rows[0].tensors[:3]
    eight_bit, split = exp_avg.dtype == torch.int8, rows[0].correction is not None
    device = param.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    numels = tuple(row.tensors[0].numel() for row in rows)
    addresses = tuple(address for row in rows for address in row.addresses())
    chunks, sizes = _TABLES.find(_chunks, numels, device, stream)
    pointers, aligned = _TABLES.find(_pointers, addresses, device, stream)
    mu, lr = hyper.mu, hyper.lr
    is_adam = hyper.preconditioner == "adam"
    exp_avg_factor: Any = 1.0 - mu
    correction2: Any = 1.0
    step: Any = 0
    per_tensor = False
    if steps and (is_adam or exp_avg.dtype == torch.bfloat16 or eight_bit):
        first = steps[0]
        per_tensor = isinstance(first, Tensor) or any(other != first for other in steps)
        if isinstance(first, Tensor):
            step = torch.stack(cast(list[Tensor], steps))
        else:
            step = first if not per_tensor else torch.tensor(steps, dtype=torch.float64)
    if hyper.corrects_first:
        exp_avg_factor = (1.0 - mu) / bias_correction(hyper.beta1, step)
    if hyper.corrects_second:
        correction2 = bias_correction(hyper.beta2, step)
    if per_tensor or isinstance(mu, Tensor):
        per_tensor = True  # a table on the device
        count = len(rows)
        exp_avg_factor, correction2 = (
            _table(x, torch.float32, count, device) for x in (exp_avg_factor, correction2)
        )
        step = _table(step, torch.int32, count, device)
    on_device = isinstance(lr, Tensor) or isinstance(mu, Tensor)
    if on_device:
        scalars = torch.stack([_table(x, torch.float32, 1, device)[0] for x in (lr, mu)])
        lr = mu = 0.0
    factor = hyper.gradient_factor
    scaled = isinstance(factor, Tensor)
    host_factor = 1.0 if scaled else float(factor)
    floor = max(hyper.eps if hyper.preconditioner == "amsgrad" else 0.0, torch.finfo(torch.float32).tiny)
    decay = hyper.weight_decay
    coupled, decoupled = (0.0, decay) if hyper.decoupled_weight_decay else (decay, 0.0)
    total = chunks.shape[0]
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(min(total, _programs(device)),)](
                pointers,
                aligned,
                sizes,
                chunks,
                total,
                scalars if on_device else pointers,
                factor if scaled else pointers,
                hyper.found_inf if hyper.found_inf is not None else pointers,
                exp_avg_factor,
                correction2,
                step,
                float(lr),
                float(mu),
                hyper.beta1,
                1.0 - hyper.beta1,
                hyper.beta2,
                1.0 - hyper.beta2,
                hyper.eps,
                floor,
                -host_factor if hyper.maximize else host_factor,
                coupled,
                decoupled,
                hyper.opposed_decay,
                1.0 - float(lr) * decoupled,
                1.0 - float(lr) * hyper.opposed_decay,
                P=ELEMENTS[param.dtype],
                G=ELEMENTS[grad.dtype],
                S=tl.int8 if eight_bit else MOMENTS[exp_avg.dtype],
                SPLIT=split,
                MODE=PRECONDITIONERS.index(hyper.preconditioner),
                FIRST=hyper.precondition_first,
                COUPLED=coupled != 0.0,
                PER_TENSOR=per_tensor,
                ON_DEVICE=on_device,
                SCALED=scaled,
                SKIPS=hyper.found_inf is not None,
                SIZE=CHUNK,
                num_warps=WARPS_FOR_EIGHT_BITS if eight_bit else WARPS,
                enable_fp_fusion=False,
            )
    except (
        Exception
    ) as error:  # of Triton, its backend, the C compiler or the driver: they have nothing in common
        raise KernelUnavailableError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def _table(value: Any, dtype: torch.dtype, count: int, device: torch.device) -> Tensor:
    """Return a number, or one of every tensor, as a table on the device."""
    if not isinstance(value, Tensor):
        return torch.full((count,), value, dtype=dtype, device=device)
    if value.device.type == "cpu" and device.type != "cpu":
        value = value.pin_memory()
    table: Tensor = value.to(device=device, dtype=dtype, non_blocking=True)
    return table.expand(count).contiguous()


def _chunks(numels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chunks of tensors, (chunks, 2) int32: tensor and number; and their sizes in elements, int64."""
    counts = (numels + (CHUNK - 1)) // CHUNK
    total = int(counts.sum())
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts, output_size=total)
    number = torch.arange(total) - torch.repeat_interleave(
        counts.cumsum(0) - counts, counts, output_size=total
    )
    return torch.stack([tensor, number], 1).to(torch.int32), numels


def _pointers(addresses: Tensor) -> tuple[Tensor, Tensor]:
    """Return a table of addresses, (tensors, 10) int64, and which rows are aligned to 128 bits, int32."""
    table = addresses.view(-1, _COLUMNS)
    return table, (table[:, :6] % 16 == 0).all(1).to(torch.int32)


class _Tables:
    """Hold tables on devices, those that were asked for last.

    A CUDA graph goes on using what it was captured with, and replays copies from main memory too, whatever has become
    of that memory: while a stream is being captured nothing is copied from there, and what is handed out is kept.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Any, tuple[int, tuple[Tensor, ...]]] = OrderedDict()
        self._in_graphs: list[tuple[Tensor, ...]] = []

    def find(
        self, make: Any, numbers: tuple[int, ...], device: torch.device, stream: int
    ) -> tuple[Tensor, ...]:
        """Return the tables that `make` makes of numbers, on a device, for kernels of a stream."""
        key = (make, numbers, device)
        made_on, tables = self._known.get(key, (None, ()))
        if _capturing(device):
            # Before a capture the device has been waited for, so tables made on another stream are there. New in a
            # capture are addresses of gradients, a few kernels; chunks are known from the steps before it.
            tables = tables or tuple(_written(table, device) for table in make(torch.tensor(numbers)))
            self._in_graphs.append(tables)
            return tables
        if made_on != stream:
            tables = tuple(_sent(table, device) for table in make(torch.tensor(numbers)))
            self._known[key] = stream, tables
        self._known.move_to_end(key)
        if len(self._known) > 512:
            self._known.popitem(last=False)
        return tables


_TABLES: Final = _Tables()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting; torch keeps the pinned memory until the copy is made."""
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _written(table: Tensor, device: torch.device) -> Tensor:
    """Make a table on the device by kernels that have its numbers among their arguments."""
    flat = torch.zeros(table.numel(), dtype=table.dtype, device=device)
    torch._foreach_add_(list(flat.unbind()), table.flatten().tolist())
    return flat.view(table.shape)


@lru_cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # Triton's interpreter
    return PROGRAMS_PER_PROCESSOR * int(torch.cuda.get_device_properties(device).multi_processor_count)


# Of numbers Triton makes code of its own where they are 1 or divisible by 16: t would compile anew at steps 2 and 16.
@triton.jit(do_not_specialize=["chunk_count", "steps"])
def kernel(  # type: ignore[no-untyped-def]
    pointers,
    aligned,
    sizes,
    chunks,
    chunk_count,
    scalars,
    factor,
    found_inf,
    exp_avg_factors,
    corrections2,
    steps,
    lr,
    mu,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    floor,
    sign,
    coupled_decay,
    decoupled_decay,
    opposed_decay,
    keep,
    keep_opposed,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
    MODE: tl.constexpr,
    FIRST: tl.constexpr,
    COUPLED: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    SCALED: tl.constexpr,
    SKIPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Take chunk after chunk; see the module.

    Args:
        pointers: (tensors, 10) int64: addresses of x, g, m, v, v̂, of the correction, of the moments' exponents; of x
            again where there is none; and the index of the first element in the whole parameter.
        aligned: (tensors,) int32: 1 where the first six are multiples of 16.
        sizes: (tensors,) int64: elements.
        chunks: (chunk_count, 2) int32: tensor, and number of the chunk in it.
        chunk_count: of all tensors.
        scalars: (2,) float32: α and μ, with ON_DEVICE.
        factor: (1,) float32: of g, with SCALED.
        found_inf: (1,) float32: where it is not 0 nothing is done, with SKIPS.
        exp_avg_factors: (1 − μ), over its bias correction where there is one; with PER_TENSOR (tensors,) float32.
        corrections2: 1 − β2ᵗ where v is corrected, else 1; likewise.
        steps: t, for stochastic rounding; likewise, int32.
        sign: of g, and what it is multiplied by where the host knows it.
        keep: what decoupled weight decay leaves of x.
        keep_opposed: likewise, where the update moves x away from 0; all of it with cautious decay.
        P: dtype of x.
        G: dtype of g.
        S: dtype of the moments; int8: 8 bits with exponents.
        SPLIT: whether x is in bfloat16 with a correction.
        MODE: index in `PRECONDITIONERS`.
        FIRST: whether m averages preconditioned gradients.
        COUPLED: whether there is coupled weight decay.
        PER_TENSOR: whether factors and steps are tables.
        ON_DEVICE: whether α and μ are read from `scalars`.
        SCALED: whether g is multiplied by `factor`.
        SKIPS: whether `found_inf` is looked at.
        SIZE: elements of a chunk.
    """
    if ON_DEVICE:
        lr = tl.load(scalars)
        mu = tl.load(scalars + 1)
        keep = 1.0 - lr * decoupled_decay
        keep_opposed = 1.0 - lr * opposed_decay
    if SCALED:
        sign = sign * tl.load(factor)
    if SKIPS:
        chunk_count = tl.where(tl.load(found_inf) == 0, chunk_count, 0)
    for number in range(tl.program_id(0), chunk_count, tl.num_programs(0)):
        tensor = tl.load(chunks + 2 * number)
        start = tl.load(chunks + 2 * number + 1).to(tl.int64) * SIZE
        size = tl.load(sizes + tensor)
        if PER_TENSOR:
            exp_avg_factor = tl.load(exp_avg_factors + tensor)
            correction2 = tl.load(corrections2 + tensor)
            step = tl.load(steps + tensor)
        else:
            exp_avg_factor = exp_avg_factors
            correction2 = corrections2
            step = steps
        row = pointers + _ROW * tensor.to(tl.int64)
        if (start + SIZE <= size) & (tl.load(aligned + tensor) == 1):
            _update(
                row, start, size, exp_avg_factor, correction2, step, lr, mu, beta1, one_minus_beta1, beta2,
                one_minus_beta2, eps, floor, sign, coupled_decay, keep, keep_opposed, P, G, S, SPLIT, MODE, FIRST,
                COUPLED, SIZE, False,
            )  # fmt: skip
        else:
            _update(
                row, start, size, exp_avg_factor, correction2, step, lr, mu, beta1, one_minus_beta1, beta2,
                one_minus_beta2, eps, floor, sign, coupled_decay, keep, keep_opposed, P, G, S, SPLIT, MODE, FIRST,
                COUPLED, SIZE, True,
            )  # fmt: skip


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    row, start, size, exp_avg_factor, correction2, step, lr, mu, beta1, one_minus_beta1, beta2,
    one_minus_beta2, eps, floor, sign, coupled_decay, keep, keep_opposed,
    P: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SPLIT: tl.constexpr, MODE: tl.constexpr,
    FIRST: tl.constexpr, COUPLED: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update a chunk, in the order of operations of csrc/fused_cpu.cpp."""
    within = start + tl.arange(0, SIZE)
    mask = within < size
    block = start // SIZE
    step_term = step.to(tl.uint32) * _STEP_FACTOR
    index_term = (tl.load(row + 9) + within).to(tl.uint32) * _INDEX_FACTOR
    x = _join(row, within, mask, MASKED) if SPLIT else _load(row, 0, within, mask, P, MASKED)
    g = sign * _load(row, 1, within, mask, G, MASKED)
    if COUPLED:
        g = g + coupled_decay * x
    denominator = tl.full([SIZE], 1.0, tl.float32)
    if MODE != _NONE:
        v = beta2 * _load_moment(row, 1, within, mask, S, MASKED, block) + (one_minus_beta2 * g) * g
        _store_moment(row, within, mask, v, index_term, step_term, 1, S, MASKED, block)
        if MODE == _AMSGRAD:
            old = _load_moment(row, 2, within, mask, S, MASKED, block)
            v_hat = _at_least(floor, tl.where(old != old, old, _at_least(old, v)))
            _store_moment(row, within, mask, v_hat, index_term, step_term, 2, S, MASKED, block)
            denominator = tl.sqrt_rn(v_hat)
        else:
            denominator = tl.sqrt_rn(tl.div_rn(_at_least(floor, v), correction2)) + eps
        if FIRST:
            g = tl.div_rn(g, denominator)
    m = beta1 * _load_moment(row, 0, within, mask, S, MASKED, block) + one_minus_beta1 * g
    _store_moment(row, within, mask, m, index_term, step_term, 0, S, MASKED, block)
    move = exp_avg_factor * m + mu * g
    opposed = ((move > 0) & (x < 0)) | ((move < 0) & (x > 0))
    x = tl.where(opposed, keep_opposed, keep) * x
    if (MODE != _NONE) & (not FIRST):
        move = tl.div_rn(move, denominator)
    x = x - lr * move
    if SPLIT:
        _split(row, within, mask, x, MASKED)
    else:
        _store(row, 0, within, mask, x, P, MASKED)


@triton.jit
def _at_least(low, value):  # type: ignore[no-untyped-def]
    """The larger of the two; NaN where `value` is NaN."""
    return tl.where(low > value, low, value)


@triton.jit
def _place(row, column, within, T: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    pointer = tl.load(row + column).to(tl.pointer_type(T))
    if not MASKED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + within


@triton.jit
def _load(row, column, within, mask, T: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load elements of dtype T as float32."""
    if tl.bfloat16 == T:
        bits = _load_as(row, column, within, mask, tl.uint16, MASKED)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    place = _place(row, column, within, T, MASKED)
    return (tl.load(place, mask=mask, other=0.0) if MASKED else tl.load(place)).to(tl.float32)


@triton.jit
def _store(row, column, within, mask, value, T: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store float32 as dtype T, rounded to nearest."""
    if tl.bfloat16 == T:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
        _store_as(row, column, within, mask, tl.where(value != value, 0x7FC0, nearest), tl.uint16, MASKED)
    else:
        _store_as(row, column, within, mask, value, T, MASKED)


@triton.jit
def _join(row, within, mask, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load masters of bfloat16 parameters (split_master.py)."""
    upper = _load_as(row, 0, within, mask, tl.uint16, MASKED).to(tl.uint32) << 16
    correction = _load_as(row, 5, within, mask, tl.int16, MASKED).to(tl.int32)
    return (upper + correction.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _split(row, within, mask, value, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store masters as parameter and correction."""
    bits = value.to(tl.uint32, bitcast=True)
    upper = (bits + 0x8000) >> 16
    correction = bits - (upper << 16)
    _store_as(row, 0, within, mask, tl.where(value != value, 0x7FC0, upper), tl.uint16, MASKED)
    _store_as(row, 5, within, mask, tl.where(value != value, 0, correction), tl.uint16, MASKED)


@triton.jit
def _load_moment(  # type: ignore[no-untyped-def]
    row, SLOT: tl.constexpr, within, mask, S: tl.constexpr, MASKED: tl.constexpr, block
):
    """Load m, v or v̂ (slots 0, 1, 2) as float32."""
    if tl.int8 == S:
        exponent = tl.load(_exponent_place(row, SLOT, block)).to(tl.int32)
        bits = tl.where(exponent == -128, 0x7FC00000, (127 + 4 * exponent) << 23)
        if SLOT == 0:
            c = _load_as(row, 2, within, mask, tl.int8, MASKED).to(tl.float32)
        else:
            c = _load_as(row, 2 + SLOT, within, mask, tl.uint8, MASKED).to(tl.float32)
        power = c * c
        power = power * power
        return tl.where(c < 0, -power, power) * bits.to(tl.float32, bitcast=True)
    else:
        return _load(row, 2 + SLOT, within, mask, S, MASKED)


@triton.jit
def _store_moment(  # type: ignore[no-untyped-def]
    row, within, mask, value, index_term, step_term, SLOT: tl.constexpr, S: tl.constexpr, MASKED: tl.constexpr,
    block,
):  # fmt: skip
    """Store m, v or v̂ (slots 0, 1, 2), with fewer bits rounded stochastically (v̂ in 8 bits: up)."""
    if tl.float32 == S:
        _store(row, 2 + SLOT, within, mask, value, S, MASKED)
    else:
        slot_term: tl.constexpr = (SLOT * 0xC2B2AE3D) % 0x100000000
        h = index_term + (step_term + slot_term)
        h = h ^ (h >> 16)
        h = h * 0x7FEB352D
        h = h ^ (h >> 15)
        h = h * 0x846CA68B
        h = h ^ (h >> 16)
        if tl.int8 == S:
            _store_eight_bits(row, within, mask, value, h >> 16, SLOT, MASKED, block)
        else:
            rounded = (value.to(tl.uint32, bitcast=True) + (h >> 16)) >> 16
            _store_as(
                row, 2 + SLOT, within, mask, tl.where(value != value, 0x7FC0, rounded), tl.uint16, MASKED
            )


@triton.jit
def _store_eight_bits(  # type: ignore[no-untyped-def]
    row, within, mask, value, random, SLOT: tl.constexpr, MASKED: tl.constexpr, block
):
    """Store a block, in the order of operations of csrc/eight_bit.h."""
    magnitude = tl.abs(value)
    bits = magnitude.to(tl.int32, bitcast=True)
    if MASKED:
        bits = tl.where(mask, bits, 0)
    largest = tl.reduce(bits, 0, _LARGER)
    top: tl.constexpr = _SIGNED_TOP if SLOT == 0 else _UNSIGNED_TOP
    highest: tl.constexpr = 127.0 if SLOT == 0 else 255.0
    exponent = tl.maximum((largest - top + 0x1FFFFFF) >> 25, -30)
    finite = largest < 0x7F800000
    y = tl.where(finite, magnitude * ((127 - 4 * exponent) << 23).to(tl.float32, bitcast=True), 0.0)
    low = tl.sqrt_rn(tl.sqrt_rn(y)).to(tl.int32).to(tl.float32)
    power = low * low
    power = power * power
    if SLOT == 2:
        up = power < y
    else:
        high = (low + 1.0) * (low + 1.0)
        u = (2 * random.to(tl.int32) + 1).to(tl.float32) * 7.62939453125e-06
        up = u * (high * high - power) < y - power
    c = tl.where(up, low + 1.0, low)
    c = tl.where(c > highest, highest, c)
    if SLOT == 0:
        c = tl.where(value < 0, -c, c)
        _store_as(row, 2, within, mask, c.to(tl.int32), tl.int8, MASKED)
    else:
        _store_as(row, 2 + SLOT, within, mask, c.to(tl.int32), tl.uint8, MASKED)
    tl.store(_exponent_place(row, SLOT, block), tl.where(finite, exponent, -128).to(tl.int8))


@triton.jit
def _exponent_place(row, SLOT: tl.constexpr, block):  # type: ignore[no-untyped-def]
    return tl.load(row + 6 + SLOT).to(tl.pointer_type(tl.int8)) + block


@triton.jit
def _load_as(row, column, within, mask, T: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    place = _place(row, column, within, T, MASKED)
    return tl.load(place, mask=mask, other=0) if MASKED else tl.load(place)


@triton.jit
def _store_as(row, column, within, mask, value, T: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    place = _place(row, column, within, T, MASKED)
    if MASKED:
        tl.store(place, value.to(T), mask=mask)
    else:
        tl.store(place, value.to(T))
