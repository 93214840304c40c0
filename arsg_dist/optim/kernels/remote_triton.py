"""Move every tensor of a list on in one launch of one Triton kernel, on CUDA and ROCm.

See `remote` for the rule, and `triton_kernel` for how tensors are found, cut into chunks, read and written. 20 bytes
per element of a float32 parameter: x, x₀ and d are read, x and d written. Every operation is rounded once and none is
contracted, so that float32 parameters have the bits of the CPU kernel.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from arsg_dist.optim.kernels.triton_kernel import (
    _COLUMNS,
    _ROW,
    _TABLES,
    CHUNK,
    ELEMENTS,
    WARPS,
    _chunks,
    _is_direct,
    _load,
    _pointers,
    _programs,
    _store,
)

_MOST_ELEMENTS: Final = CHUNK * (2**31 - 1)

_failed = False


def triton_move_on(
    tensors: list[Tensor],
    before: list[Tensor],
    movements: list[Tensor],
    *,
    beta1: float,
    pull: float,
    reach: float,
    decay: float,
) -> list[int]:
    """Change parameters and movements in one launch, without synchronising with the device.

    Args:
        tensors: see `remote.move_on`.
        before: likewise.
        movements: likewise.
        beta1: of `remote.Move`.
        pull: likewise.
        reach: likewise.
        decay: likewise.

    Returns:
        The indices of those that are left as they are: float64, those with gaps or overlaps in memory, or whose
        movement is laid out otherwise; all, where the kernel cannot run.
    """
    global _failed
    everything = list(range(len(tensors)))
    if _failed or tensors[0].dtype not in ELEMENTS or any(x.numel() > _MOST_ELEMENTS for x in tensors):
        return everything
    # Without a movement the column has x again, which is not touched then.
    rows = list(zip(tensors, before, movements or tensors, strict=True))
    direct = [_is_direct(row) and all(part.dtype in ELEMENTS for part in row) for row in rows]
    taken = [row for row, fits in zip(rows, direct, strict=True) if fits and row[0].numel()]
    try:
        if taken:
            _launch(taken, (beta1, pull, reach, decay), moves=bool(movements))
    except (
        Exception
    ) as error:  # of Triton, its backend, the C compiler or the driver: they have nothing in common
        _failed = True
        warnings.warn(
            f"RemoteObservation runs without its GPU kernel: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}",
            stacklevel=2,
        )
        return everything
    torch.autograd.graph.increment_version(tensors)  # as every in-place operation: a stale graph is noticed
    return [index for index, fits in enumerate(direct) if not fits]


def _launch(
    rows: list[tuple[Tensor, Tensor, Tensor]], numbers: tuple[float, float, float, float], *, moves: bool
) -> None:
    param = rows[0][0]
    device = param.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    chunks, sizes = _TABLES.find(_chunks, tuple(row[0].numel() for row in rows), device, stream)
    # Rows as long as the other kernel's.
    addresses = tuple(part.data_ptr() for row in rows for part in (*row, *[row[0]] * (_COLUMNS - len(row))))
    pointers, aligned = _TABLES.find(_pointers, addresses, device, stream)
    total = chunks.shape[0]
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(min(total, _programs(device)),)](
            pointers,
            aligned,
            sizes,
            chunks,
            total,
            *numbers,
            P=ELEMENTS[param.dtype],
            DECAYS=numbers[-1] != 0,
            MOVES=moves,
            SIZE=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=["chunk_count"])
def kernel(  # type: ignore[no-untyped-def]
    pointers, aligned, sizes, chunks, chunk_count, beta1, pull, reach, decay,
    P: tl.constexpr, DECAYS: tl.constexpr, MOVES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Take chunk after chunk; the arguments as of `triton_kernel.kernel`, with rows of x, x₀ and d.

    Args:
        pointers: (tensors, 5) int64: addresses of x, x₀, d; two more are not read.
        aligned: (tensors,) int32.
        sizes: (tensors,) int64.
        chunks: (chunk_count, 2) int32.
        chunk_count: of all tensors.
        beta1: of a `Move`, as the following.
        pull: likewise.
        reach: likewise.
        decay: likewise.
        P: dtype of x and x₀.
        DECAYS: whether there is cautious weight decay.
        MOVES: whether there are movements.
        SIZE: elements of a chunk.
    """
    for number in range(tl.program_id(0), chunk_count, tl.num_programs(0)):
        tensor = tl.load(chunks + 2 * number)
        start = tl.load(chunks + 2 * number + 1).to(tl.int64) * SIZE
        size = tl.load(sizes + tensor)
        row = pointers + _ROW * tensor.to(tl.int64)
        if (start + SIZE <= size) & (tl.load(aligned + tensor) == 1):
            _move_on(row, start, size, beta1, pull, reach, decay, P, DECAYS, MOVES, SIZE, False)
        else:
            _move_on(row, start, size, beta1, pull, reach, decay, P, DECAYS, MOVES, SIZE, True)


@triton.jit
def _move_on(  # type: ignore[no-untyped-def]
    row, start, size, beta1, pull, reach, decay,
    P: tl.constexpr, DECAYS: tl.constexpr, MOVES: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Move a chunk on, in the order of operations of csrc/remote_cpu.cpp."""
    within = start + tl.arange(0, SIZE)
    mask = within < size
    x = _load(row, 0, within, mask, P, MASKED)
    old = _load(row, 1, within, mask, P, MASKED)
    if DECAYS:
        step = x - old
        away = ((step > 0) & (old > 0)) | ((step < 0) & (old < 0))
        x = tl.where(away, x, x - decay * old)
    if MOVES:
        d = beta1 * _load(row, 2, within, mask, tl.float32, MASKED) + pull * (x - old)
        _store(row, 2, within, mask, d, tl.float32, MASKED)
        x = x + reach * d
    _store(row, 0, within, mask, x, P, MASKED)
