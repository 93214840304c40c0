"""Which implementation of the update a parameter group gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import _default_to_fused_or_foreach

from arsg_dist.optim.foreach import foreach_step
from arsg_dist.optim.fused import cpu_kernel, fused_step
from arsg_dist.optim.hyper import StepFunction
from arsg_dist.optim.reference import reference_step


def step_function(group: dict[str, Any], params: list[Tensor]) -> StepFunction:
    """The implementation for a group's tensors.

    What `fused` and `foreach` ask for; if neither was set, the fused kernel for plain CPU tensors, and elsewhere
    `foreach` where torch's own optimizers would use it (plain tensors on an accelerator) and no hyper-parameter is a
    tensor that has to be read on the host. torch would loop over CPU tensors; with the one flat tensor that ZeRO
    makes, that is several times slower than the kernel.
    """
    foreach, fused = group["foreach"], group["fused"]
    if foreach is None and fused is None:
        if all(type(p) in (Tensor, Parameter) and p.is_cpu for p in params):
            fused = torch.compiler.is_compiling() or cpu_kernel() is not None
        else:
            _, foreach = _default_to_fused_or_foreach(params, differentiable=False, use_fused=False)
            if not group["capturable"] and any(isinstance(group[name], Tensor) for name in ("lr", "mu")):
                foreach = False
    if fused:
        return fused_step
    return foreach_step if foreach else reference_step
