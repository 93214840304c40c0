"""Optimize with Lion, which torch does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from arsg_dist.optim.hyperparameters import number
from arsg_dist.optim.state import local, real


class Lion(Optimizer):
    """Step by the sign of an interpolation between momentum and gradient (Chen et al., arXiv 2302.06675).

    With the gradient g at the parameters x, element by element::

        x ← x − lr·(sign(β1·m + (1−β1)·g) + λx)        m ← β2·m + (1−β2)·g

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: learning rate; a third to a tenth of AdamW's, with λ as many times larger.
        betas: weight of the momentum in the step, β1, and its decay, β2.
        weight_decay: λ, decoupled.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a setting out of range.
        TypeError: a setting of the wrong kind.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {betas!r}")
        defaults = {
            "lr": number("lr", lr),
            "betas": tuple(number(f"betas[{i}]", beta, at_most=1.0) for i, beta in enumerate(betas)),
            "weight_decay": number("weight_decay", weight_decay),
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have gradients.

        Args:
            closure: reevaluates the model and returns the loss; called once, before the update.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for param in params:
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"Lion does not support sparse gradients (got layout {param.grad.layout})"
                    )
                if "exp_avg" not in self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
            self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        tensors = [real(local(param)).detach() for param in params]
        grads = [real(local(param.grad)) for param in params if param.grad is not None]
        moments = [real(local(self.state[param]["exp_avg"])) for param in params]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        direction = torch._foreach_mul(moments, beta1)
        torch._foreach_add_(direction, grads, alpha=1 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(tensors, direction, alpha=-group["lr"])
        torch._foreach_mul_(moments, beta2)
        torch._foreach_add_(moments, grads, alpha=1 - beta2)
