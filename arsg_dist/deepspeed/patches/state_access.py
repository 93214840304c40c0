"""Correct DeepSpeed's safe_get_full_* and safe_set_full_* functions.

By themselves they reach the optimizer state of the first parameter group only, lose it after a checkpoint is
loaded, read and write other parameters' elements with `round_robin_gradients`, and where they fail they do so on some
ranks, while the others wait for ever.
"""

import functools
import inspect
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import link_hp_params
from torch import Tensor
from torch.optim import Optimizer

from arsg_dist.deepspeed.patching import Method, is_repaired, repair_once, wrap_once
from arsg_dist.deepspeed.versions import flat_offsets, ranks_of_parameter
from arsg_dist.optim.kernels.eight_bit import EightBit
from arsg_dist.optim.state import has_eight_bit_state


def patch_state_access() -> None:
    """Apply all of these patches; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    repair_once(DeepSpeedZeroOptimizer, "_link_all_hp_params", _with_links_renewed)
    wrap_once(BF16_Optimizer, "_link_all_hp_params", _with_access_checked)
    repair_once(DeepSpeedZeroOptimizer, "_lazy_init_hp_params_optimizer_state", _with_every_group_linked)
    repair_once(
        DeepSpeedZeroOptimizer_Stage3,
        "set_full_hp_param",
        _with_padding_left_alone,
        relies_on=("_get_fp32_opt_state_partition",),
    )
    repair_once(DeepSpeedZeroOptimizer_Stage3, "_get_fp32_opt_state_partition", _with_absent_state_said)
    repair_once(DeepSpeedZeroOptimizer_Stage3, "set_fp32_grad_for_param", _with_gradient_padded)


def _with_links_renewed(method: Method) -> Method:
    """Give new links to masters their links to state, and checks (stages 1 and 2)."""

    def _link_all_hp_params(zero: Any) -> None:
        method(zero)
        if not is_repaired(zero.optimizer):
            return
        if zero.round_robin_gradients:
            _link_where_parameters_lie(zero)
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
        _check_access(zero.optimizer, zero.bit16_groups, zero.single_partition_of_fp32_groups)

    return _link_all_hp_params


def _with_access_checked(method: Method) -> Method:
    """Give new links checks (stage 1 in bf16 with fp32 gradients)."""

    def _link_all_hp_params(wrapper: Any) -> None:
        method(wrapper)
        if is_repaired(wrapper.optimizer):
            _check_access(wrapper.optimizer, wrapper.bf16_groups, wrapper.fp32_groups_flat_partition)

    return _link_all_hp_params


def _check_access(optimizer: Optimizer, groups: list[Any], masters: list[Tensor]) -> None:
    for parameters, master in zip(groups, masters, strict=True):
        for parameter in parameters:
            for name in ("get_full_hp_param", "set_full_hp_param"):
                unchecked = getattr(parameter, name)
                setattr(parameter, name, functools.partial(_checked, unchecked, optimizer, master))


def _link_where_parameters_lie(zero: Any) -> None:
    """Link parameters to where round_robin_gradients puts them in their flat group.

    Their order there is another than in the parameter group. DeepSpeed heeds that only where
    `parameter_alignment` pads; else its links lead to elements of other parameters.
    """
    for index, parameters in enumerate(zero.bit16_groups):
        in_order = zip(zero.round_robin_bit16_groups[index], flat_offsets(zero, index), strict=True)
        offsets = {id(parameter): offset for parameter, offset in in_order}
        size = int(zero.partition_size[index])  # some versions divide it as a float
        if "param_offsets" in inspect.signature(link_hp_params).parameters:
            places = {"param_offsets": [offsets[id(parameter)] for parameter in parameters]}
        else:  # until 0.19.6 they lie one after another
            parameters, places = zero.round_robin_bit16_groups[index], {}
        link_hp_params(
            lp_param_list=parameters,
            flat_hp_partition=zero.single_partition_of_fp32_groups[index],
            gradient_dict=zero.averaged_gradients,
            offload_gradient_dict=zero.offload_gradient_dict,
            use_offload=zero.cpu_offload,
            param_group_index=index,
            partition_start=size * deepspeed.comm.get_rank(group=zero.real_dp_process_group[index]),
            partition_size=size,
            dp_group=zero.real_dp_process_group[index],
            **places,
        )


def _checked(unchecked: Method, optimizer: Optimizer, master: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Refuse state that is not there, on every rank alike.

    Each rank has a part of the group, if not of the parameter.
    """
    key = kwargs.get("optim_state_key")
    for argument in args:
        key = argument if isinstance(argument, str) else key
    _check_state_is_there(optimizer, master, key)
    return unchecked(*args, **kwargs)


def _check_state_is_there(optimizer: Optimizer, master: Tensor, key: str | None) -> None:
    state = optimizer.state.get(master, {})
    if key is not None and isinstance(state.get(key), EightBit):
        raise ValueError(
            f"{key!r} is kept in 8 bits in blocks that span parameters (state_dtype '8bit'): DeepSpeed's functions "
            "cannot get or set a parameter's part of it"
        )
    if key is not None and not isinstance(state.get(key), Tensor):
        has = [name for name, value in state.items() if isinstance(value, Tensor)]
        raise ValueError(
            f"there is no optimizer state {key!r} of this parameter: "
            + (f"there is {has}" if has else "state appears with the first update")
        )


def _with_every_group_linked(method: Method) -> Method:
    """Link state when all groups have it (stages 1 and 2).

    DeepSpeed links the state of all groups after the step of the first, when the others have none yet, and never again.
    """

    def _lazy_init_hp_params_optimizer_state(zero: Any) -> None:
        masters = zero.single_partition_of_fp32_groups
        if is_repaired(zero.optimizer) and has_eight_bit_state(zero.optimizer):
            return  # links would be copies in float32
        if not is_repaired(zero.optimizer) or all(zero.optimizer.state.get(m) for m in masters):
            method(zero)

    return _lazy_init_hp_params_optimizer_state


def _with_padding_left_alone(method: Method) -> Method:
    """Set parameters whose elements do not divide by the number of ranks (stage 3).

    DeepSpeed cuts a padded part for the last rank out of the value, which has no padding, and raises there.
    """

    def set_full_hp_param(
        zero: Any, value: Tensor, parameter: Any, optim_state_key: str | None = None
    ) -> None:
        if not is_repaired(zero.optimizer) or not parameter.requires_grad:
            method(zero, value, parameter, optim_state_key)
            return
        if value.numel() != parameter.ds_numel:
            raise ValueError(f"a value of {value.numel()} elements for a parameter of {parameter.ds_numel}")
        part, group = zero._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False, optim_state_key=optim_state_key
        )
        start = part.numel() * deepspeed.comm.get_rank(group=ranks_of_parameter(zero, parameter))
        mine = value.detach().flatten()[start : start + part.numel()]
        part.data[: mine.numel()].copy_(mine)
        if zero._swappable_optimizer_subgroup(group):
            zero._optimizer_states_and_gradient_swap_out(group)

    return set_full_hp_param


def _with_absent_state_said(method: Method) -> Method:
    """Refuse state that is not there as at stages 1 and 2 (stage 3).

    DeepSpeed raises a KeyError of the name alone, with NVMe after it has taken the group's files into its buffers.
    """

    def _get_fp32_opt_state_partition(
        zero: Any, param: Any, release_swap_buffers: bool, optim_state_key: str | None = None
    ) -> Any:
        if is_repaired(zero.optimizer):
            index, *_ = zero.grad_position[zero.get_param_id(param)]
            _check_state_is_there(zero.optimizer, zero.fp32_partitioned_groups_flat[index], optim_state_key)
        return method(zero, param, release_swap_buffers, optim_state_key)

    return _get_fp32_opt_state_partition


def _with_gradient_padded(method: Method) -> Method:
    """Set the gradient of such parameters (stage 3)."""

    def set_fp32_grad_for_param(zero: Any, value: Tensor, parameter: Any) -> None:
        if is_repaired(zero.optimizer) and parameter.requires_grad:
            if value.numel() != parameter.ds_numel:
                raise ValueError(
                    f"a gradient of {value.numel()} elements for a parameter of {parameter.ds_numel}"
                )
            ranks = deepspeed.comm.get_world_size(group=ranks_of_parameter(zero, parameter))
            missing = ranks * parameter.partition_numel() - value.numel()
            value = torch.nn.functional.pad(value.detach().flatten(), (0, missing))
        method(zero, value, parameter)

    return set_fp32_grad_for_param
