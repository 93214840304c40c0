"""Lookahead: slow parameters that follow the fast ones and pull them back every k steps."""

from __future__ import annotations

import torch
from torch import Tensor


def lookahead_(param: Tensor, slow_param: Tensor, step: int | Tensor, k: int, alpha: float) -> None:
    """If `step` is a multiple of k: slow ← slow + a(x − slow), x ← slow. In place.

    Args:
        param: x, any dtype.
        slow_param: the slow copy, of the same shape, in the computing dtype.
        step: steps taken so far; a 0-dim tensor is never read on the host.
        k: period, > 0.
        alpha: a in [0, 1].
    """
    if isinstance(step, Tensor):
        due = step % k == 0
        slow_param.copy_(torch.where(due, slow_param.lerp(param.to(slow_param.dtype), alpha), slow_param))
        param.copy_(torch.where(due, slow_param.to(param.dtype), param))
    elif step % k == 0:
        slow_param.lerp_(param.to(slow_param.dtype), alpha)
        param.copy_(slow_param)
