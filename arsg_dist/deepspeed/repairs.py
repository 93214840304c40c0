"""What DeepSpeed 0.19.8 does wrong in ARSG's eyes, put right for engines whose optimizer is an ARSG.

Adam hides all of this or suffers too; engines with another optimizer are left exactly as they are. The tests compare
every ZeRO stage and precision with a single process, and fail where a repair is missing or no longer needed.
"""

import functools
from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from arsg_dist.optim import ARSG

Method = Callable[..., Any]


def wrap_once(owner: type, name: str, wrap: Callable[[Method], Method]) -> None:
    """Replaces a method of DeepSpeed by ``wrap(method)``, unless that was done before.

    Raises:
        RuntimeError: this DeepSpeed has no such method.
    """
    method = getattr(owner, name, None)
    if method is None:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} has no {owner.__name__}.{name}; arsg_dist works with 0.19.8"
        )
    if not hasattr(method, "_wrapped_for_arsg"):
        wrapper = functools.wraps(method)(wrap(method))
        wrapper._wrapped_for_arsg = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapper)


def apply_repairs() -> None:
    """Applies all of them; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    wrap_once(FP16_UnfusedOptimizer, "initialize_optimizer_states", _without_warm_up_step)
    wrap_once(_Engine, "backward", _with_loss_scaled)
    wrap_once(DeepSpeedZeroOptimizer_Stage3, "step", _with_gradients_forgotten)


def _without_warm_up_step(method: Method) -> Method:
    """Stage 0, bf16 and fp16: ARSG's state is left to its first step.

    DeepSpeed has the optimizer allocate its state by a step with zero gradients. With coupled weight decay that is no
    empty step: it moves the weights and fills the moments before any data was seen; and it counts as a step.
    """

    def initialize_optimizer_states(wrapper: Any) -> None:
        if not isinstance(wrapper.optimizer, ARSG):
            method(wrapper)
            return
        for group in (*wrapper.fp16_groups, *wrapper.fp32_groups):
            for parameter in group:
                parameter.grad = None  # as DeepSpeed leaves them

    return initialize_optimizer_states


def _with_loss_scaled(method: Method) -> Method:
    """Stage 0, fp16: the loss is scaled before the backward pass.

    DeepSpeed's `backward` leaves that out, and its step still divides the gradient by the loss scale. Adam hardly
    depends on the size of gradients and trains on; ARSG's floor ε has a size, and with it nearly nothing would move.
    """

    def backward(engine: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
        wrapper = engine.optimizer
        if not (
            isinstance(wrapper, FP16_UnfusedOptimizer)
            and isinstance(wrapper.optimizer, ARSG)
            and wrapper.loss_scale_config.use_grad_scaling
        ):
            return method(engine, loss, *args, **kwargs)
        scale = wrapper.loss_scale_config.cur_scale
        # In fp32, for a scaled fp16 loss overflows where its gradient need not.
        return method(engine, loss.float() * scale, *args, **kwargs) / scale

    return backward


def _with_gradients_forgotten(method: Method) -> Method:
    """Stage 3: the gradients of an update are forgotten after it.

    DeepSpeed overwrites only the gradients of parameters that the next backward pass reaches. Any other parameter is
    updated with its old gradient once more, and after an overflow its infinite one has the next update skipped too.
    """

    def step(zero: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(zero, *args, **kwargs)
        if isinstance(zero.optimizer, ARSG) and zero.grad_partitions_flat_buffer is not None:
            zero.grad_partitions_flat_buffer.zero_()
        return result

    return step
