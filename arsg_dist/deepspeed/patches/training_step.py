"""Correct what DeepSpeed 0.19.8's backward pass and step do wrong under ARSG.

Adam hides all of this or suffers too; engines with another optimizer are left exactly as they are. The tests compare
every ZeRO stage and precision with a single process, and fail where a patch is missing or no longer needed.
"""

from collections.abc import Callable
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from arsg_dist.deepspeed.patching import Method, wrap_once
from arsg_dist.optim import ARSG


def patch_training_step() -> None:
    """Apply all of these patches; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    wrap_once(FP16_UnfusedOptimizer, "initialize_optimizer_states", _without_warm_up_step)
    wrap_once(_Engine, "backward", _with_loss_scaled)
    wrap_once(DeepSpeedZeroOptimizer, "reduce_gradients", _with_every_gradient_reduced)
    wrap_once(DeepSpeedZeroOptimizer, "async_accumulate_grad_in_cpu_via_gpu", _with_new_sum_begun)
    for owner, of_every_parameter in (
        (FP16_UnfusedOptimizer, _nothing),
        (DeepSpeedZeroOptimizer, _complete_offloaded_gradients),
        (DeepSpeedZeroOptimizer_Stage3, _complete_partitioned_gradients),
    ):
        wrap_once(owner, "_update_scale", _with_growth_put_off)
        wrap_once(owner, "step", _with_gradients_of_this_update(of_every_parameter))


def _without_warm_up_step(method: Method) -> Method:
    """Leave ARSG's state to its first step (stage 0, bf16 and fp16).

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
    """Scale the loss before the backward pass (stage 0, fp16).

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


def _with_every_gradient_reduced(method: Method) -> Method:
    """Reduce gradients the last micro-batch adds nothing to (stage 1, overlap_comm).

    DeepSpeed reduces in the backward pass of the last micro-batch what that reaches, and leaves out the rest.
    """

    def reduce_gradients(zero: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(zero.optimizer, ARSG) and zero.overlap_comm:
            waiting = {number for bucket in zero.ipg_buckets.values() for _, _, number in bucket.params}
            for index, group in enumerate(zero.bit16_groups):
                for parameter in group:
                    number = zero.get_param_id(parameter)
                    reached = number in waiting or zero.params_already_reduced[number]
                    if not reached and zero.get_gradient_for_reduction(parameter) is not None:
                        zero.reduce_ready_partitions_and_remove_grads(parameter, index)
        method(zero, *args, **kwargs)

    return reduce_gradients


def _with_growth_put_off(method: Method) -> Method:
    """Use a grown loss scale from the next update on (fp16, every stage).

    DeepSpeed doubles it between the backward pass and the division of the gradient by it, and so halves the gradient of
    that update.
    """

    def update_scale(wrapper: Any, *args: Any, **kwargs: Any) -> None:
        scaler = _loss_scaler(wrapper)
        scale = scaler.cur_scale
        method(wrapper, *args, **kwargs)
        if isinstance(wrapper.optimizer, ARSG) and scaler.cur_scale > scale:
            wrapper._next_scale, scaler.cur_scale = scaler.cur_scale, scale

    return update_scale


def _with_gradients_of_this_update(complete: Callable[[Any], None]) -> Callable[[Method], Method]:
    """Update with the gradients of its own micro-batches, all of them, and no others.

    Stage 3: DeepSpeed overwrites only the gradients of parameters that the next backward pass reaches. Any other
    parameter is updated with its old gradient once more, and after an overflow its infinite one has the next update
    skipped too. The optimizer offloaded, stages 1 to 3: the same; and the gradient of a parameter that the last
    micro-batch does not reach is left out. `complete` puts the latter right before the step.
    """

    def wrap(method: Method) -> Method:
        def step(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(wrapper.optimizer, ARSG):
                return method(wrapper, *args, **kwargs)
            complete(wrapper)
            result = method(wrapper, *args, **kwargs)
            _forget_gradients(wrapper)
            if hasattr(wrapper, "_next_scale"):
                _loss_scaler(wrapper).cur_scale = wrapper._next_scale
                del wrapper._next_scale
            return result

        return step

    return wrap


def _forget_gradients(wrapper: Any) -> None:
    if getattr(wrapper, "grad_partitions_flat_buffer", None) is not None:  # stage 3
        wrapper.grad_partitions_flat_buffer.zero_()
    if getattr(wrapper, "swap_optimizer", False):  # stage 3, NVMe: files that the next step would read again
        for swapped in wrapper.optimizer_swapper.swap_params_info.values():
            swapped.swapped_gradients.clear()
            swapped.release_unswapped_gradients()
    if getattr(wrapper, "cpu_offload", False):  # stages 1 and 2: fp32 sums, which an overflow leaves infinite
        wrapper.averaged_gradients = dict.fromkeys(wrapper.averaged_gradients)


def _loss_scaler(wrapper: Any) -> Any:
    return wrapper.loss_scale_config if isinstance(wrapper, FP16_UnfusedOptimizer) else wrapper.loss_scaler


def _nothing(wrapper: Any) -> None:
    del wrapper


def _complete_offloaded_gradients(zero: Any) -> None:
    """Give every parameter its gradient, if only zero (stages 1 and 2, offload)."""
    if not zero.cpu_offload:
        return
    reached, finished = zero._offload_accumulated_param_ids, zero.norm_for_param_grads
    late = set()
    for group, partition in zip(zero.params_in_partition, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            number = zero.get_param_id(parameter)
            if number in finished:
                continue
            if number in reached:
                late.add(number)
            else:
                zero._wait_for_offload_copies()
                _, _, start, length = zero.grad_position[number]
                partition.grad.view(-1).narrow(0, start, length).zero_()
    if late:
        zero._offload_accumulated_param_ids = late
        zero._finalize_cpu_offload_gradient_accumulation()


def _with_new_sum_begun(method: Method) -> Method:
    """Begin a new sum with a parameter's first gradient (stages 1 and 2, offload).

    DeepSpeed adds it to the sum of the update before where it does not come from the first micro-batch.
    """

    def accumulate(zero: Any, parameter: Any) -> None:
        number = zero.get_param_id(parameter)
        if isinstance(zero.optimizer, ARSG) and number not in zero._offload_accumulated_param_ids:
            zero._wait_for_offload_copies()
            total = zero.accumulated_grads_in_cpu.get(number)
            if total is not None:
                total.zero_()
        method(zero, parameter)

    return accumulate


def _complete_partitioned_gradients(zero: Any) -> None:
    """Give every parameter its gradient, zero if it got none (stage 3, offload)."""
    if not zero.offload_optimizer:
        return
    partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    gradients: dict[int, Any] = {}
    offsets: dict[int, Any] = {}
    for group in zero.fp16_groups:
        for parameter in group:
            if zero.get_param_id(parameter) not in zero.norm_for_param_grads:
                gradient = partitions[parameter.ds_id].to(get_accelerator().current_device_name())
                zero._offload_grad_partition_at_boundary(parameter, gradient, gradients, offsets)
    zero._swap_out_offload_fp32_gradients(gradients, offsets)
