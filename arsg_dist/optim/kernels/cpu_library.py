"""Load the compiled kernels for CPU tensors and register them as operators of torch.

The library (csrc/) has a plain C interface on bare pointers and links against the C library only, so one build serves
every torch and Python: what it needs of tensors is read here. Its threads are those of the OpenMP runtime that torch
has loaded. A kernel that is added to csrc/ gets here its argument types in `_load`, and an operator in `register`.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

PATH: Final = Path(__file__).with_name("arsg_cpu.so")
"""Where the build puts the library; not there where it was built without a compiler."""

_INTERFACE: Final = 3  # of csrc/library.cpp
_TYPES: Final = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_EIGHT_BIT: Final = 4  # type of moments (eight_bit.py)
_SPLIT: Final = 5  # type of bfloat16 parameters with corrections (split_master.py)
_STATE_TYPES: Final = (torch.float32, torch.float64, torch.bfloat16)
_AMSGRAD, _ADAM, _NONE = range(3)
_FIRST: Final = {_AMSGRAD: 3, _ADAM: 4, _NONE: _NONE}  # the modes with precondition_first
_JOB: Final = struct.Struct("=9Q2d3q")  # csrc/fused_cpu.cpp
_MOVE_JOB: Final = struct.Struct("=3Qq")  # csrc/remote_cpu.cpp


class UnusableLibraryError(Exception):
    """Say why the compiled kernels cannot be used."""


@cache
def register() -> None:
    """Load the library and make its functions torch's operators `torch.ops.arsg_dist.*`.

    Raises:
        UnusableLibraryError: it is not there, cannot be loaded, or is not of this version of the package.
    """
    _load()
    # The dispatcher keeps out what has no plain memory: fake, meta and distributed tensors, negated views.
    global _registered
    _registered = torch.library.Library("arsg_dist", "DEF")  # type: ignore[no-untyped-call]
    _registered.define(  # type: ignore[no-untyped-call]
        "update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, int[] steps, *, int preconditioner, float lr, float beta1, float beta2, "
        "float mu, float eps, float coupled_decay, float decoupled_decay, float opposed_decay, float gradient_factor, "
        "bool corrects_first, bool corrects_second, bool precondition_first, Tensor(e!)[] exponents, "
        "Tensor(f!)[] corrections, int[] firsts) -> int[]"
    )
    _registered.impl("update_", _update, "CPU")  # type: ignore[no-untyped-call]
    _registered.define(  # type: ignore[no-untyped-call]
        "move_on_(Tensor(a!)[] params, Tensor[] before, Tensor(b!)[] movements, *, float beta1, float pull, "
        "float reach, float decay) -> int[]"
    )
    _registered.impl("move_on_", _move_on, "CPU")  # type: ignore[no-untyped-call]


_registered: torch.library.Library | None = None  # its operators live as long as it does


@cache
def _load() -> ctypes.CDLL:
    """Load the library and hand it torch's threads."""
    if not PATH.exists():
        raise UnusableLibraryError("it was not compiled")
    try:
        library = ctypes.CDLL(str(PATH))
        interface = library.arsg_interface()
    except (OSError, AttributeError) as error:
        raise UnusableLibraryError(str(error)) from error
    if interface != _INTERFACE:
        raise UnusableLibraryError(f"{PATH} was compiled from another version")
    try:
        # Found through what torch itself is linked with, whichever runtime that is.
        torchs = ctypes.CDLL(torch._C.__file__)
        runtime = [
            ctypes.cast(getattr(torchs, name), ctypes.c_void_p)
            for name in ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
        ]
    except (OSError, AttributeError) as error:
        raise UnusableLibraryError(f"this torch has no OpenMP threads: {error}") from error
    library.arsg_use_openmp.argtypes = [ctypes.c_void_p] * 3
    library.arsg_use_openmp(*runtime)
    library.arsg_update.argtypes = [
        ctypes.c_char_p, ctypes.c_int64, *[ctypes.c_int] * 4, *[ctypes.c_double] * 9,
    ]  # fmt: skip
    library.arsg_update.restype = ctypes.c_bool
    library.arsg_move_on.argtypes = [
        ctypes.c_char_p, ctypes.c_int64, *[ctypes.c_int] * 2, ctypes.c_bool, *[ctypes.c_double] * 4,
    ]  # fmt: skip
    library.arsg_move_on.restype = ctypes.c_bool
    return library


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[int],
    *,
    preconditioner: int,
    lr: float,
    beta1: float,
    beta2: float,
    mu: float,
    eps: float,
    coupled_decay: float,
    decoupled_decay: float,
    opposed_decay: float,
    gradient_factor: float,
    corrects_first: bool,
    corrects_second: bool,
    precondition_first: bool,
    exponents: list[Tensor],
    corrections: list[Tensor],
    firsts: list[int],
) -> list[int]:
    """Update all parameters in one pass over memory; return the indices of those that are left as they are.

    Left, to the caller, are parameters with gaps or overlaps in memory, and those whose gradient or a moment is laid
    out otherwise. The arguments are those of `StepFunction` and `Hyperparameters`; weight_decay is split into its kinds
    (`opposed_decay` is what of the decoupled one acts also where the update moves x away from 0), bias_correction into
    the two moments', and `gradient_factor` has the sign of `maximize`. With `exponents` (of all m, then v, then v̂) the
    moments are the codes of `EightBit`.
    """
    count, is_adam = len(params), preconditioner == _ADAM
    if preconditioner not in _FIRST:
        raise ValueError(f"unknown preconditioner {preconditioner}")
    if (corrects_first or corrects_second) and not is_adam:
        raise ValueError("bias correction is for preconditioner adam")
    if count == 0:
        return []
    if not exp_avgs:
        raise ValueError("exp_avgs must have one entry per parameter")
    param_type, state_type = _known(params[0].dtype), exp_avgs[0].dtype
    eight_bit = bool(exponents)
    if state_type not in _STATE_TYPES and not eight_bit:
        raise ValueError(f"state must be float32, float64 or bfloat16, not {state_type}")
    if eight_bit and param_type == torch.float64:
        raise ValueError("state in 8 bits is not for float64")
    if corrections and (param_type != torch.bfloat16 or state_type == torch.float64):
        raise ValueError("corrections are for bfloat16")
    has_steps = is_adam or state_type == torch.bfloat16 or eight_bit
    moments = [exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    wanted = [count, 0 if preconditioner == _NONE else count, count if preconditioner == _AMSGRAD else 0]
    if (
        len(grads) != count
        or [len(m) for m in moments] != wanted
        or (has_steps and len(steps) != count)
        or len(exponents) != eight_bit * sum(wanted)
        or len(corrections) not in (0, count)
        or len(firsts) not in (0, count)
    ):
        raise ValueError(
            "the lists that the preconditioner needs must have one entry per parameter, the others none"
        )
    types = (torch.int8, torch.uint8, torch.uint8) if eight_bit else (state_type,) * 3
    addresses, left = _places(
        [
            (params, param_type),
            *[(m, dtype) for m, dtype in zip(moments, types, strict=True) if m],
            (grads, param_type),
            *([(corrections, torch.int16)] if corrections else []),
        ]
    )
    nowhere = [0] * count
    of_corrections = addresses.pop() if corrections else nowhere
    *of_moments, of_grads = addresses[1:]
    of_exponents = [[e.data_ptr() for e in exponents[k : k + count]] for k in range(0, len(exponents), count)]
    t_of = steps if has_steps else [0] * count
    columns = zip(
        addresses[0],
        *of_moments,
        *[nowhere] * (3 - len(of_moments)),
        of_grads,
        of_corrections,
        *of_exponents,
        *[nowhere] * (3 - len(of_exponents)),
        [(1 - mu) / (1 - beta1**t) for t in t_of] if corrects_first else [1 - mu] * count,
        [1 - beta2**t for t in t_of] if corrects_second else [1.0] * count,
        t_of,
        [p.numel() for p in params],
        firsts or nowhere,
        strict=True,
    )
    skipped = frozenset(left)
    jobs = [_JOB.pack(*job) for k, job in enumerate(columns) if k not in skipped]
    known = _load().arsg_update(
        b"".join(jobs), len(jobs), torch.get_num_threads(),
        _FIRST[preconditioner] if precondition_first else preconditioner,
        _SPLIT if corrections else _TYPES[param_type], _EIGHT_BIT if eight_bit else _TYPES[state_type],
        lr, beta1, beta2, mu, eps, coupled_decay, decoupled_decay, opposed_decay, gradient_factor,
    )  # fmt: skip
    assert known
    _announce_change(params)
    return left


def _move_on(
    params: list[Tensor],
    before: list[Tensor],
    movements: list[Tensor],
    *,
    beta1: float,
    pull: float,
    reach: float,
    decay: float,
) -> list[int]:
    """Move all parameters on in one pass over memory; return the indices of those that are left as they are.

    Left, to the caller, are parameters with gaps or overlaps in memory, and those whose x₀ or movement is laid out
    otherwise. The arguments are those of `remote.move_on` and `remote.Move`.
    """
    count, moves = len(params), bool(movements)
    if len(before) != count or (moves and len(movements) != count):
        raise ValueError("the lists must have one entry per parameter")
    if count == 0 or (not moves and decay == 0.0):
        return []
    param_type = _known(params[0].dtype)
    movement_type = torch.float64 if param_type == torch.float64 else torch.float32
    lists = [(params, param_type), *([(movements, movement_type)] if moves else []), (before, param_type)]
    addresses, left = _places(lists)
    *of_movements, of_before = addresses[1:]
    columns = zip(
        addresses[0], *(of_movements or [[0] * count]), of_before, [p.numel() for p in params], strict=True
    )
    skipped = frozenset(left)
    jobs = [_MOVE_JOB.pack(*job) for k, job in enumerate(columns) if k not in skipped]
    known = _load().arsg_move_on(
        b"".join(jobs),
        len(jobs),
        torch.get_num_threads(),
        _TYPES[param_type],
        moves,
        beta1,
        pull,
        reach,
        decay,
    )
    assert known
    _announce_change(params)
    return left


def _places(lists: list[tuple[list[Tensor], torch.dtype]]) -> tuple[list[list[int]], list[int]]:
    """Return the addresses of tensors, list by list; and the indices of those that are laid out otherwise than others.

    Args:
        lists: the parameters, and what belongs to them, with the dtype that each list must have.

    Raises:
        ValueError: another dtype or shape, or no memory of the CPU.
    """
    # List by list, which is faster than tensor by tensor. Tensors that are not on the CPU have no address here; the
    # dispatcher keeps out those with one of their own.
    params = lists[0][0]
    shapes, sizes = [p.shape for p in params], [p.numel() for p in params]
    addresses = [[t.data_ptr() for t in tensors] for tensors, _ in lists]
    for (tensors, dtype), places in zip(lists, addresses, strict=True):
        if (
            {t.dtype for t in tensors} != {dtype}
            or [t.shape for t in tensors] != shapes
            or (0 in places and any(size and not place for size, place in zip(sizes, places, strict=True)))
        ):
            raise ValueError(
                f"expected CPU tensors of {dtype} with the parameters' sizes and memory of their own"
            )
    contiguous = zip(*[[t.is_contiguous() for t in tensors] for tensors, _ in lists], strict=True)
    left = [
        k
        for k, all_of in enumerate(contiguous)
        if not all(all_of) and not _in_one_order([tensors[k] for tensors, _ in lists])
    ]
    return addresses, left


def _known(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _TYPES:
        raise ValueError(f"parameters must be float32, float64, bfloat16 or float16, not {dtype}")
    return dtype


def _announce_change(params: list[Tensor]) -> None:
    """Let autograd notice a stale graph, as after every in-place operation."""
    torch.autograd.graph.increment_version([param for param in params if not param.is_inference()])


def _in_one_order(tensors: list[Tensor]) -> bool:
    """Say whether elements of all tensors lie in one order of memory without gaps."""
    return is_dense(tensors[0]) and all(t.stride() == tensors[0].stride() for t in tensors)


def is_dense(tensor: Tensor) -> bool:
    """Say whether a tensor's elements fill a piece of memory, each its own place."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected and tensor.numel():
                return False
            expected *= size
    return True
