"""Move on to the next observation point: by foreach, or in one pass over memory by the CPU's or the GPU's kernel.

The rule of `RemoteObservation`, after its inner optimizer's step and for every element, with x after that step, x₀
before it, and the decay of cautious weight decay::

    x ← x − decay·x₀        of elements that x − x₀ does not move away from 0
    d ← β1·d + pull·(x − x₀)
    x ← x + reach·d
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from arsg_dist.optim.hyperparameters import compute_dtype
from arsg_dist.optim.kernels import cpu_library

Kernel: TypeAlias = Callable[..., Sequence[int]]
"""Moves tensors, and returns the indices of those that it leaves as they are."""


@dataclass(frozen=True, slots=True)
class Move:
    """Hold the rule's numbers for a group.

    Attributes:
        beta1: decay of the average movement.
        pull: share of the step in the average, (1−β1)/μ over the unit that movements are kept in.
        reach: how far the observation runs ahead, (1−μ) times that unit; 0 for nowhere, without movements.
        decay: lr·λ of cautious weight decay.
    """

    beta1: float
    pull: float
    reach: float
    decay: float | Tensor = 0.0


def move_on(tensors: list[Tensor], before: list[Tensor], movements: list[Tensor], move: Move) -> None:
    """Change parameters and movements in place.

    Args:
        tensors: x after the inner optimizer's step; real, of one dtype, on one device.
        before: x₀, of the same shapes and dtype.
        movements: d, in the dtype of the arithmetic; none where `reach` is 0.
        move: the numbers.
    """
    lists = (tensors, before, movements)
    left: Sequence[int] = range(len(tensors))
    plain = all(type(x) in (Tensor, Parameter) for x in tensors) and not isinstance(move.decay, Tensor)
    if plain and tensors and not torch.compiler.is_compiling():
        kernel = None
        if all(x.is_cpu for x in tensors):
            kernel = cpu_kernel()
        elif all(x.is_cuda for x in tensors):
            kernel = _gpu_kernel()
        if kernel is not None:
            left = kernel(*lists, beta1=move.beta1, pull=move.pull, reach=move.reach, decay=move.decay)
    if left:
        x, x0, d = ([many[i] for i in left] if many else [] for many in lists)
        _by_foreach(x, x0, d, move)


@cache
def cpu_kernel() -> Kernel | None:
    """Return the C++ kernel, or None where it is not built; ARSG warns of that, whose step it slows down far more."""
    try:
        cpu_library.register()
    except cpu_library.UnusableLibraryError:
        return None
    return cast(Kernel, torch.ops.arsg_dist.move_on_.default)


@cache
def _gpu_kernel() -> Kernel | None:
    try:
        from arsg_dist.optim.kernels.remote_triton import triton_move_on
    except ImportError:  # torch for GPUs brings Triton along, other builds may not
        return None
    return triton_move_on


def _by_foreach(tensors: list[Tensor], before: list[Tensor], movements: list[Tensor], move: Move) -> None:
    dtype = compute_dtype(tensors[0].dtype)
    old = [x.to(dtype) for x in before]
    after = [x.to(dtype) for x in tensors]
    if isinstance(move.decay, Tensor) or move.decay:
        after = [_decayed(x, start, move.decay) for x, start in zip(after, old, strict=True)]
    if movements:
        change = torch._foreach_sub(after, old)
        torch._foreach_mul_(change, move.pull)
        torch._foreach_mul_(movements, move.beta1)
        torch._foreach_add_(movements, change)
        after = list(torch._foreach_add(after, torch._foreach_mul(movements, move.reach)))
    torch._foreach_copy_(tensors, after)


def _decayed(x: Tensor, start: Tensor, decay: float | Tensor) -> Tensor:
    """Let decay those elements that the step did not move away from 0."""
    return torch.where((x - start).sign() * start.sign() <= 0, x - decay * start, x)
