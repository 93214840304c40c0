"""What single settings of a DeepSpeed config mean, as DeepSpeed 0.19.8 reads them."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

AUTO: Final = "auto"
"""A value that the program is to fill in."""

HALF_PRECISIONS: Final = {"fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
"""Sections of a config that choose the model's dtype; the last is an older name."""


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the model that a config makes; "auto" counts as left out, as with DeepSpeed."""
    for name, dtype in HALF_PRECISIONS.items():
        if (config.get(name) or {}).get("enabled") is True:
            return dtype
    return torch.float32


def accumulation_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which a config has gradients accumulated.

    Raises:
        ValueError: one that DeepSpeed does not know.
    """
    name = (config.get("data_types") or {}).get("grad_accum_dtype")
    if name in (None, AUTO):
        return model_dtype(config)
    try:
        dtype: torch.dtype = DtypeEnum(name).value
    except ValueError:
        raise ValueError(
            f"data_types.grad_accum_dtype = {name!r}: DeepSpeed knows fp32, bf16 and fp16"
        ) from None
    return dtype


def offload_device(zero: Mapping[str, Any], key: str, *, older_name: str) -> str:
    """Where a config's section zero_optimization offloads something: "none", "cpu" or "nvme".

    Args:
        zero: the section.
        key: offload_optimizer or offload_param.
        older_name: DeepSpeed's older name for it, a switch that means the CPU.
    """
    if zero.get(older_name) not in (None, False, AUTO):
        return "cpu"
    device: str = (zero.get(key) or {}).get("device", "none")
    return "none" if device == AUTO else device


def place_of(offload: Any) -> str:
    """The same of what DeepSpeed made of the config: "device", "cpu" or "nvme".

    Args:
        offload: `offload_optimizer` or `offload_param` of a `DeepSpeedZeroConfig`, or None.
    """
    device = "none" if offload is None else OffloadDeviceEnum(offload.device).value
    return "device" if device == "none" else device
