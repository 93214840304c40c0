"""Which implementation of the update a parameter group gets."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from arsg_dist.optim.foreach import foreach_step
from arsg_dist.optim.hyper import StepFunction
from arsg_dist.optim.reference import reference_step


def step_function(group: dict[str, Any], params: list[Tensor]) -> StepFunction:
    """The implementation for a group's tensors, chosen as torch's optimizers do.

    `fused` only on request; else `foreach` if asked for, or if neither was set and torch would use it (plain
    tensors on an accelerator) and no hyper-parameter is a tensor that has to be read on the host.
    """
    if group["fused"]:
        from arsg_dist.optim.fused import fused_step

        return fused_step
    foreach = group["foreach"]
    if foreach is None and group["fused"] is None:
        _, foreach = _default_to_fused_or_foreach(params, differentiable=False, use_fused=False)
        if not group["capturable"] and any(isinstance(group[name], Tensor) for name in ("lr", "mu")):
            foreach = False
    return foreach_step if foreach else reference_step
