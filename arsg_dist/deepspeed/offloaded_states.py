"""Make `engine.offload_states()` and `reload_states()` work with ARSG at stage 3.

DeepSpeed 0.19.8 refuses optimizers other than its FusedAdam there ("Offloading is supported only for DeepSpeed
FusedAdam"): it moves the two moments it knows by name, and leaves copies of them in the optimizer's state. Here masters
and state of ARSG are moved as at stages 1 and 2, whatever the entries are called.
"""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import offload_optimizer_states, reload_optimizer_states
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from arsg_dist.deepspeed.patching import Method, wrap_once
from arsg_dist.deepspeed.versions import taken_for_fused_adam
from arsg_dist.optim.by_name import OURS
from arsg_dist.optim.state import has_eight_bit_state

_OURS = (OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states)


def support_offloaded_states() -> None:
    """Wrap both; calling this again changes nothing.

    Raises:
        RuntimeError: this DeepSpeed is built differently.
    """
    wrap_once(DeepSpeedZeroOptimizer_Stage3, "offload_states", _with_state_of_arsg_moved)
    wrap_once(DeepSpeedZeroOptimizer_Stage3, "reload_states", _with_state_of_arsg_moved_back)


def _with_state_of_arsg_moved(method: Method) -> Method:
    def offload_states(
        zero: Any,
        include: Any = None,
        device: Any = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        options = {"device": device, "pin_memory": pin_memory, "non_blocking": non_blocking}
        if not isinstance(zero.optimizer, OURS):
            method(zero, include=include, **options)
            return
        asked = list(OffloadStateTypeEnum) if include is None else list(include)
        mine = [kind for kind in _OURS if kind in asked and kind not in zero.offloaded_states]
        if OffloadStateTypeEnum.optim_states in mine and has_eight_bit_state(zero.optimizer):
            raise ValueError(
                "offload_states(): ARSG's state_dtype '8bit' cannot be moved by DeepSpeed; leave 'optim_states' out of "
                "`include`, or use another state_dtype"
            )
        with taken_for_fused_adam(zero):
            method(zero, include=[kind for kind in asked if kind not in _OURS], **options)
        if OffloadStateTypeEnum.hp_params in mine:
            _move_masters(zero, device.value, pin_memory=pin_memory, non_blocking=non_blocking)
        if OffloadStateTypeEnum.optim_states in mine:
            offload_optimizer_states(
                zero.optimizer, device.value, pin_memory=pin_memory, non_blocking=non_blocking
            )
        zero.offloaded_states.update(mine)
        get_accelerator().empty_cache()

    return offload_states


def _move_masters(zero: Any, device: str, *, pin_memory: bool, non_blocking: bool) -> None:
    """Do it as DeepSpeed does, whose `reload_states` moves them back."""
    masters = zero.fp32_partitioned_groups_flat
    if not pin_memory:
        for master in masters:
            master.data = master.data.to(device, non_blocking=non_blocking)
        return
    if not hasattr(zero, "hp_params_pin_buffers"):
        zero.hp_params_pin_buffers = [
            get_accelerator().pin_memory(torch.empty_like(master, device=device)) for master in masters
        ]
    for master, buffer in zip(masters, zero.hp_params_pin_buffers, strict=True):
        buffer.copy_(master, non_blocking=non_blocking)
        master.data = buffer


def _with_state_of_arsg_moved_back(method: Method) -> Method:
    def reload_states(zero: Any, non_blocking: bool = False) -> None:
        mine = isinstance(zero.optimizer, OURS) and OffloadStateTypeEnum.optim_states in zero.offloaded_states
        if mine:
            zero.offloaded_states.remove(OffloadStateTypeEnum.optim_states)
            # DeepSpeed waits for the copies only where it is asked to make them without waiting.
            held = reload_optimizer_states(
                zero.optimizer, get_accelerator().current_device_name(), non_blocking=non_blocking
            )
            method(zero, non_blocking=non_blocking)
            if non_blocking:
                get_accelerator().synchronize()
            del held
        else:
            method(zero, non_blocking=non_blocking)

    return reload_states
