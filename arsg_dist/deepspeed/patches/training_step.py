"""Correct what DeepSpeed's backward pass and step do wrong.

For ARSG, and for other optimizers only where `repair` was asked to; else their engines are left exactly as they are
(but for one wait, `_with_every_weight_awaited`).
docs/deepspeed-defects.md has a script for each defect. The tests compare every ZeRO stage and precision with a single
process, and fail where a repair is missing.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine as _Engine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from packaging.version import Version

from arsg_dist.deepspeed.patching import Method, is_repaired, repair_once
from arsg_dist.deepspeed.versions import loss_scaler


def patch_training_step() -> None:
    """Apply all of these patches; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    repair_once(FP16_UnfusedOptimizer, "initialize_optimizer_states", _without_warm_up_step)
    repair_once(
        _Engine,
        "backward",
        _with_loss_scaled,
        since="0.18.3",  # before, the wrapper's own `backward` was called, which scales
        relies_on=("_backward_prologue", "_backward_epilogue"),
    )
    repair_once(
        DeepSpeedZeroOptimizer,
        "reduce_gradients",
        _with_every_gradient_reduced,
        relies_on=("reduce_ready_partitions_and_remove_grads", "get_gradient_for_reduction"),
    )
    repair_once(
        DeepSpeedZeroOptimizer,
        "async_accumulate_grad_in_cpu_via_gpu",
        _with_whole_sums,
        relies_on=("copy_grads_in_partition", "_wait_for_offload_copies"),
    )
    repair_once(
        DeepSpeedZeroOptimizer,
        "independent_gradient_partition_epilogue",
        _with_sums_gone_on_with,
        relies_on=("get_all_grad_tensors", "get_flat_partition"),
        until="0.18.2",
    )
    repair_once(Init, "_allgather_params_coalesced", _with_every_weight_awaited, until="0.19.7")
    for owner, of_every_parameter, relies_on in (
        (FP16_UnfusedOptimizer, _nothing, ("unscale_and_clip_grads",)),
        (
            DeepSpeedZeroOptimizer,
            _complete_offloaded_gradients,
            ("_finalize_cpu_offload_gradient_accumulation", "update_offload_overflow_tracker"),
        ),
        (DeepSpeedZeroOptimizer_Stage3, _complete_partitioned_gradients, ("partition_grads",)),
    ):
        repair_once(owner, "_update_scale", _with_growth_put_off)
        repair_once(owner, "step", _with_gradients_of_this_update(of_every_parameter), relies_on=relies_on)


def _without_warm_up_step(method: Method) -> Method:
    """Leave the optimizer's state to its first step (stage 0, bf16 and fp16).

    DeepSpeed has the optimizer allocate its state by a step with zero gradients. With coupled weight decay that is no
    empty step: it moves the weights and fills the moments before any data was seen; and it counts as a step.
    """

    def initialize_optimizer_states(wrapper: Any) -> None:
        if not is_repaired(wrapper.optimizer):
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
            and is_repaired(wrapper.optimizer)
            and engine.fp16_enabled()
        ):
            return method(engine, loss, *args, **kwargs)
        scale = loss_scaler(wrapper).cur_scale
        # In fp32, for a scaled fp16 loss overflows where its gradient need not.
        return method(engine, loss.float() * scale, *args, **kwargs) / scale

    return backward


def _with_every_gradient_reduced(method: Method) -> Method:
    """Reduce gradients the last micro-batch adds nothing to (stage 1, overlap_comm).

    DeepSpeed reduces in the backward pass of the last micro-batch what that reaches, and leaves out the rest.
    """

    def reduce_gradients(zero: Any, *args: Any, **kwargs: Any) -> None:
        if is_repaired(zero.optimizer) and zero.overlap_comm:
            waiting = {number for bucket in zero.ipg_buckets.values() for _, _, number in bucket.params}
            for index, group in enumerate(zero.bit16_groups):
                for parameter in group:
                    number = zero.get_param_id(parameter)
                    reached = number in waiting or zero.params_already_reduced[number]
                    if not reached and zero.get_gradient_for_reduction(parameter) is not None:
                        zero.reduce_ready_partitions_and_remove_grads(parameter, index)
        method(zero, *args, **kwargs)

    return reduce_gradients


def _with_sums_gone_on_with(method: Method) -> Method:
    """Add up the gradients of an update's micro-batches (stage 2, until 0.18.2).

    DeepSpeed takes `averaged_gradients`, which it fills after the last micro-batch, for the sums that it keeps in
    `all_grad_tensors`, and begins them anew in each micro-batch.
    """

    def independent_gradient_partition_epilogue(zero: Any) -> None:
        begun = []
        if is_repaired(zero.optimizer) and not zero.cpu_offload:
            done = zero.averaged_gradients
            begun = [
                i for i, sums in zero.all_grad_tensors.items() if sums is not None and done.get(i) is None
            ]
        for index in begun:
            zero.averaged_gradients[index] = []
        method(zero)
        if not zero.is_gradient_accumulation_boundary:
            for index in begun:
                zero.averaged_gradients[index] = None

    return independent_gradient_partition_epilogue


def _with_every_weight_awaited(method: Method) -> Method:
    """Gather weights that are whole (stage 3, CPU ranks, until 0.19.7).

    DeepSpeed begins one gather for each parameter and waits for the last of them. Others may still be under way then,
    in memory that was never written: on a GPU a synchronisation follows, on the CPU it is none. `GatheredParameters`
    and the weights that stay gathered after a step come this way, before there is an optimizer and for any; the wait
    changes nothing that was right. Here each is gathered by a call of its own, which makes it the last.
    """

    def gather(init: Any, parameters: Any, *args: Any, **kwargs: Any) -> None:
        if get_accelerator().device_name() != "cpu":
            method(init, parameters, *args, **kwargs)
            return
        for parameter in parameters:
            method(init, [parameter], *args, **kwargs)

    return gather


def _with_growth_put_off(method: Method) -> Method:
    """Use a grown loss scale from the next update on (fp16, every stage).

    DeepSpeed doubles it between the backward pass and the division of the gradient by it, and so halves the gradient of
    that update.
    """

    def update_scale(wrapper: Any, *args: Any, **kwargs: Any) -> None:
        scaler = loss_scaler(wrapper)
        scale = scaler.cur_scale
        method(wrapper, *args, **kwargs)
        if is_repaired(wrapper.optimizer) and scaler.cur_scale > scale:
            wrapper._next_scale, scaler.cur_scale = scaler.cur_scale, scale

    return update_scale


def _with_gradients_of_this_update(complete: Callable[[Any], None]) -> Callable[[Method], Method]:
    """Update with the gradients of its own micro-batches, all of them, and no others.

    Stage 3: DeepSpeed overwrites only the gradients of parameters that the next backward pass reaches. Any other
    parameter is updated with its old gradient once more, and after an overflow its infinite one has the next update
    skipped too. The optimizer offloaded, stages 1 to 3: the same; and the gradient of a parameter that the last
    micro-batch does not reach is left out. `complete` puts the latter right before the step.

    Stages 1 and 2 without autograd: versions around 0.18.9 gather the weights into views, which newer releases of torch
    refuse otherwise (on CPU ranks: "a view and is being modified inplace").
    """

    def wrap(method: Method) -> Method:
        def step(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
            if not is_repaired(wrapper.optimizer):
                return method(wrapper, *args, **kwargs)
            complete(wrapper)
            with torch.no_grad() if isinstance(wrapper, DeepSpeedZeroOptimizer) else nullcontext():
                result = method(wrapper, *args, **kwargs)
            _forget_gradients(wrapper)
            if hasattr(wrapper, "_next_scale"):
                loss_scaler(wrapper).cur_scale = wrapper._next_scale
                del wrapper._next_scale
            return result

        return step

    return wrap


def empty_in_place(gradients: dict[int, Any]) -> None:
    """Forget the gradients of every group, in this very dictionary: `safe_get_full_grad` looks into it."""
    gradients.update(dict.fromkeys(gradients))


def _forget_gradients(wrapper: Any) -> None:
    if getattr(wrapper, "grad_partitions_flat_buffer", None) is not None:  # stage 3
        wrapper.grad_partitions_flat_buffer.zero_()
    if getattr(wrapper, "swap_optimizer", False):  # stage 3, NVMe: files that the next step would read again
        for swapped in wrapper.optimizer_swapper.swap_params_info.values():
            swapped.swapped_gradients.clear()
            swapped.release_unswapped_gradients()
    if getattr(wrapper, "cpu_offload", False):  # stages 1 and 2: fp32 sums, which an overflow leaves infinite
        empty_in_place(wrapper.averaged_gradients)


def _nothing(wrapper: Any) -> None:
    del wrapper


def _complete_offloaded_gradients(zero: Any) -> None:
    """Give every parameter its gradient, if only zero (stages 1 and 2, offload)."""
    if not zero.cpu_offload:
        return
    reached, finished = _with_sums(zero), zero.norm_for_param_grads
    late = set()
    for group, partition in zip(zero.params_in_partition, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            number = zero.get_param_id(parameter)
            if number in finished:
                continue
            if number in reached:
                late.add(number)
                if not hasattr(zero, "_finalize_cpu_offload_gradient_accumulation"):
                    _finalize_sum(zero, parameter, partition)
            else:
                _wait_for_copies(zero)
                _, _, start, length = zero.grad_position[number]
                partition.grad.view(-1).narrow(0, start, length).zero_()
    if late and hasattr(zero, "_finalize_cpu_offload_gradient_accumulation"):
        zero._offload_accumulated_param_ids = late
        zero._finalize_cpu_offload_gradient_accumulation()
    zero.__dict__.pop("_summed_for_arsg", None)


def _finalize_sum(zero: Any, parameter: Any, partition: Any) -> None:
    """Do for a sum what DeepSpeed does from 0.19.5 on."""
    number = zero.get_param_id(parameter)
    _, source, start, length = zero.grad_position[number]
    total = zero.accumulated_grads_in_cpu[number].view(-1)
    total = total.narrow(0, source, length) if total.numel() == parameter.numel() else total
    zero.norm_for_param_grads[number] = total.double().norm(2)
    zero.update_offload_overflow_tracker(total)
    partition.grad.view(-1).narrow(0, start, length).copy_(total)


def _with_sums(zero: Any) -> set[int]:
    """Return the parameters whose gradients of this update are being summed up; it may be changed."""
    if hasattr(zero, "_offload_accumulated_param_ids"):  # since 0.19.5
        numbers: set[int] = zero._offload_accumulated_param_ids
    else:
        numbers = zero.__dict__.setdefault("_summed_for_arsg", set())
    return numbers


def forget_sums(zero: Any) -> None:
    """Begin the sums of an update anew (stages 1 and 2, offload)."""
    _with_sums(zero).clear()


def _wait_for_copies(zero: Any) -> None:
    if hasattr(
        zero, "_wait_for_offload_copies"
    ):  # since 0.19.8; before, the copies are awaited where they are made
        zero._wait_for_offload_copies()


def _with_whole_sums(method: Method) -> Method:
    """Sum up a parameter's gradients of this update, all and no others (stages 1 and 2, offload).

    DeepSpeed adds the first one to the sum of the update before where it does not come from the first micro-batch.
    Before 0.19.0 it also does not keep the sum after the second one, so that those between the first and the last are
    lost.
    """
    keeps = Version(deepspeed.__version__) >= Version("0.19.0")

    def accumulate(zero: Any, parameter: Any) -> None:
        number, summed = zero.get_param_id(parameter), _with_sums(zero)
        repaired = is_repaired(zero.optimizer)
        if repaired and number not in summed:
            _wait_for_copies(zero)
            total = zero.accumulated_grads_in_cpu.get(number)
            if total is not None:
                total.zero_()
        method(zero, parameter)
        if repaired:
            if not keeps and zero.micro_step_id > 0:
                _keep_sum(zero, parameter)
            summed.add(number)

    return accumulate


def _keep_sum(zero: Any, parameter: Any) -> None:
    number = zero.get_param_id(parameter)
    _, source, _, length = zero.grad_position[number]
    total, gradient = zero.accumulated_grads_in_cpu[number], zero.get_param_gradient_attribute(parameter)
    gradient = gradient.data.view(-1)
    total.view(-1).copy_(
        gradient if total.numel() == gradient.numel() else gradient.narrow(0, source, length)
    )


def _complete_partitioned_gradients(zero: Any) -> None:
    """Give every parameter its gradient, zero if it got none (stage 3, offload).

    What DeepSpeed does with the others in `partition_grads`.
    """
    if not zero.offload_optimizer:
        return
    partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    swapped: dict[int, tuple[list[int], list[Any]]] = {}
    for group in zero.fp16_groups:
        for parameter in group:
            number = zero.get_param_id(parameter)
            if number in zero.norm_for_param_grads:
                continue
            gradient = partitions[parameter.ds_id].to(get_accelerator().current_device_name())
            zero.norm_for_param_grads[number] = zero._constant_buffered_norm2(gradient)
            index, offset, _ = zero.grad_position[number]
            if zero._swappable_optimizer_subgroup(index):
                offsets, gradients = swapped.setdefault(index, ([], []))
                offsets.append(offset)
                gradients.append(gradient.float())
            else:
                place = zero.fp32_partitioned_groups_flat[index].grad
                place.narrow(0, offset, gradient.numel()).copy_(gradient)
    for index, (offsets, gradients) in swapped.items():
        zero.optimizer_swapper.swap_out_gradients(
            parameter=zero.fp32_partitioned_groups_flat[index],
            gradient_offsets=offsets,
            gradient_tensors=gradients,
        )
