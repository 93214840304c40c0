"""Choose the implementation of the update that a parameter group gets."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import _default_to_fused_or_foreach

from arsg_dist.optim.hyperparameters import Hyperparameters, StepFunction
from arsg_dist.optim.kernels import foreach, fused
from arsg_dist.optim.kernels.foreach import foreach_step
from arsg_dist.optim.kernels.fused import cpu_kernel, fused_step
from arsg_dist.optim.kernels.reference import reference_step


@cache
def has_triton() -> bool:
    """Say whether Triton is installed, which torch for GPUs brings along."""
    return importlib.util.find_spec("triton") is not None


def step_function(group: dict[str, Any], hyper: Hyperparameters, params: list[Tensor]) -> StepFunction:
    """Return the fastest wanted implementation that supports a group's settings and tensors.

    Wanted is what `fused` and `foreach` ask for; if neither was set, the fused kernel for plain CPU tensors, for those
    on CUDA and ROCm where Triton is there, and elsewhere `foreach` where torch's own optimizers would use it (plain
    tensors on an accelerator); neither where a hyperparameter is a tensor that has to be read on the host. torch would
    loop over CPU tensors; with the one flat tensor that ZeRO makes, that is several times slower than the kernel. The
    reference supports everything.

    Args:
        group: the parameter group.
        hyper: its settings, as the update reads them.
        params: those of its parameters that are updated together.
    """
    wants_foreach, wants_fused = group["foreach"], group["fused"]
    if wants_foreach is None and wants_fused is None:
        if all(type(p) in (Tensor, Parameter) and p.is_cpu for p in params):
            wants_fused = torch.compiler.is_compiling() or cpu_kernel() is not None
        else:
            _, wants_foreach = _default_to_fused_or_foreach(params, differentiable=False, use_fused=False)
            if not group["capturable"] and any(isinstance(group[name], Tensor) for name in ("lr", "mu")):
                wants_foreach = False
            wants_fused = wants_foreach and all(p.is_cuda for p in params) and has_triton()
    if wants_fused and fused.supports(hyper, params):
        return fused_step
    if (wants_fused or wants_foreach) and foreach.supports(hyper, params):
        return foreach_step
    return reference_step
