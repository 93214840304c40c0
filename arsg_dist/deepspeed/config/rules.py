"""Read settings as DeepSpeed 0.19.8 does; refuse those that fail with ARSG."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from deepspeed.runtime.config import DtypeEnum
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch.optim import Optimizer

from arsg_dist.optim.by_name import ELEMENT_WISE, INNER
from arsg_dist.optim.hyperparameters import EIGHT_BIT
from arsg_dist.optim.state import MOMENTS

AUTO: Final = "auto"
"""A value that the program is to fill in."""

HALF_PRECISIONS: Final = {"fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
"""Sections of a config that choose the model's dtype; the last is an older name."""

OFFLOADS: Final = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}
"""What zero_optimization can offload → DeepSpeed's older name for it, a switch that means the CPU."""

_DEFAULT_BUFFER_COUNT: Final = 4  # runtime/zero/offload_config.py


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of the model; "auto" counts as left out, as with DeepSpeed."""
    for name, dtype in HALF_PRECISIONS.items():
        if (config.get(name) or {}).get("enabled") is True:
            return dtype
    return torch.float32


def accumulation_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype in which a config has gradients accumulated.

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


def offload_device(zero: Mapping[str, Any], key: str) -> str:
    """Return where a config offloads something: "none", "cpu" or "nvme".

    Args:
        zero: the section zero_optimization.
        key: of `OFFLOADS`.
    """
    if zero.get(OFFLOADS[key]) not in (None, False, AUTO):
        return "cpu"
    device: str = (zero.get(key) or {}).get("device", "none")
    return "none" if device == AUTO else device


def place_of(offload: Any) -> str:
    """Return the same of what DeepSpeed made of the config: "device", "cpu" or "nvme".

    Args:
        offload: `offload_optimizer` or `offload_param` of a `DeepSpeedZeroConfig`, or None.
    """
    device = "none" if offload is None else OffloadDeviceEnum(offload.device).value
    return "device" if device == "none" else device


def require_object(section: Mapping[str, Any], key: str, source: str) -> None:
    """Refuse another value than an object, or none, for a key.

    Raises:
        ValueError: naming `source` and the key.
    """
    if section.get(key) is not None and not isinstance(section[key], dict):
        raise ValueError(f"{source} has {key} = {section[key]!r}: it must be a JSON object")


def check_sections(config: dict[str, Any], source: str) -> None:
    """Refuse settings outside the optimizer section.

    Args:
        config: content of a DeepSpeed config, complete or not.
        source: what messages call it.

    Raises:
        ValueError: with the setting and the reason.
    """
    zero = config.get("zero_optimization")
    for key in OFFLOADS:
        require_object(zero if isinstance(zero, dict) else {}, key, f"{source}'s zero_optimization")
    for key, (present, reason) in {**_of_zero(config), **_of_precision(config)}.items():
        if present:
            raise ValueError(f"{source} sets {key}, which does not work with ARSG: {reason}")


def _of_zero(config: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    stage = zero.get("stage", 0)
    offload = zero.get("offload_optimizer") or {}
    device = offload_device(zero, "offload_optimizer")
    prefix = "zero_optimization."
    return {
        f"{prefix}zenflow": (
            zero.get("zenflow") is not None,
            "ZenFlow updates the selected part of the weights with its own AdamW, not with ARSG",
        ),
        f"{prefix}offload_optimizer.ratio": (
            device != "none" and offload.get("ratio", 1.0) != 1.0,
            "Twin-Flow updates the part that stays on the GPU with torch's AdamW, and accepts DeepSpeedCPUAdam only "
            "for the rest: remove it, or set it to 1.0",
        ),
        f"{prefix}offload_optimizer.super_offload": (
            bool(offload.get("super_offload", False)),
            "SuperOffload's update on the CPU is Adam, not ARSG",
        ),
        f"{prefix}offload_optimizer": (
            device != "none" and stage == 0,
            "at stage 0 DeepSpeed offloads nothing: set stage 1, 2 or 3, or remove it",
        ),
        f"{prefix}offload_optimizer.device = 'nvme'": (
            device == "nvme" and stage in (1, 2),
            "at stages 1 and 2 DeepSpeed keeps the state in CPU memory all the same: set stage 3, or device 'cpu'",
        ),
        f"{prefix}offload_param": (
            offload_device(zero, "offload_param") != "none" and stage != 3,
            "below stage 3 DeepSpeed offloads no parameters: set stage 3, or remove it",
        ),
    }


def _of_precision(config: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    zero, autocast = config.get("zero_optimization"), config.get("torch_autocast") or {}
    fp16 = config.get("fp16") or {}
    bf16 = config.get("bf16") or config.get("bfloat16") or {}
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    undecided = any((config.get(name) or {}).get("enabled") == AUTO for name in HALF_PRECISIONS)
    return {
        "data_types.grad_accum_dtype": (
            accumulation_dtype(config) != model_dtype(config) and stage == 0 and not undecided,
            "at stage 0 DeepSpeed accumulates gradients in the model's dtype only: set stage 1, 2 or 3, or remove it",
        ),
        "fp16.fp16_master_weights_and_grads": (
            bool(fp16.get("fp16_master_weights_and_grads", False)),
            "DeepSpeed accepts it with DeepSpeedCPUAdam only",
        ),
        "bf16.bf16_optimizer_states": (
            bool(bf16.get("bf16_optimizer_states", False)),
            "only DeepSpeed's own Adams heed it: choose the dtype of ARSG's moments with state_dtype",
        ),
        "bf16.bf16_master_weights_and_grads": (
            bool(bf16.get("bf16_master_weights_and_grads", False)),
            "DeepSpeed accepts it with DeepSpeedCPUAdam only, or with bf16_optimizer_states, which ARSG does not heed",
        ),
        "torch_autocast.dtype = 'float16'": (
            bool(autocast.get("enabled", False))
            and str(autocast.get("dtype")).removeprefix("torch.") in ("float16", "fp16", "half")
            and stage != 0,
            "under ZeRO its loss scale never falls after an overflow, so that no update is made any more, and clipping "
            "compares the scaled gradient: use the section fp16, or dtype 'bfloat16'",
        ),
    }


_WHOLE_TENSORS: Final = ("Adafactor", "LAMB", "LBFGS", "Lamb", "Muon", "MuonWithAuxAdam", "SOAP", "Shampoo")
"""Names of methods that look at whole tensors, wherever their classes come from."""


def check_partitioned(inner: type[Optimizer], config: Mapping[str, Any], source: str) -> None:
    """Refuse an optimizer inside a RemoteObservation that ZeRO's flat partitions would change.

    Args:
        inner: its class.
        config: content of a DeepSpeed config.
        source: what messages call it.

    Raises:
        ValueError: it looks at whole tensors, is not known to update each element by itself, makes its state too early,
            or has state that is not read from DeepSpeed's files.
    """
    name = inner.__name__
    if inner in (torch.optim.ASGD, torch.optim.NAdam):
        raise ValueError(
            f"{source} has RemoteObservation around {name}: it keeps numbers beside its step count, which are not read "
            "from DeepSpeed's checkpoints; use Adam or SGD inside, or another engine"
        )
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if not stage or stage == AUTO:
        return
    if inner is torch.optim.Adagrad:
        raise ValueError(
            f"{source} has RemoteObservation around Adagrad at ZeRO stage {stage}: Adagrad makes its state before "
            "DeepSpeed divides the parameters; use RMSprop or Adam inside, or the engine horovod-sharded"
        )
    if inner in ELEMENT_WISE:
        return
    if name not in _WHOLE_TENSORS and config.get("zero_allow_untested_optimizer") is True:
        return
    at_all = (
        "needs whole tensors" if name in _WHOLE_TENSORS else "is not known to update each element by itself"
    )
    untested = "" if name in _WHOLE_TENSORS else '; if it does, write "zero_allow_untested_optimizer": true'
    raise ValueError(
        f"{source} has RemoteObservation around {name} at ZeRO stage {stage}: {name} {at_all}, and ZeRO gives it flat "
        f"partitions; use stage 0, or ddp, fsdp or Horovod's DistributedOptimizer, or an optimizer such as AdamW, SGD, "
        f"Lion or ARSG inside{untested}"
    )


def check_masters(groups: Iterable[Mapping[str, Any]], source: str) -> None:
    """Refuse split masters: DeepSpeed makes masters of its own, in fp32.

    Args:
        groups: settings of the optimizer, of every parameter group.
        source: what messages call the config.

    Raises:
        ValueError: with the setting and the reason.
    """
    if any(group.get("master") not in (None, AUTO) for group in groups):
        raise ValueError(
            f"{source} has ARSG's master='split', which is for parameters that the optimizer itself keeps in bfloat16: "
            "under DeepSpeed it updates fp32 masters of DeepSpeed's; leave it out"
        )


def check_nvme(zero: Mapping[str, Any], groups: Iterable[Mapping[str, Any]], source: str) -> None:
    """Refuse an optimizer that does not fit the buffers for swapping to NVMe.

    The buffers have the size of a sub-group in fp32. A sub-group needs one for its weights, its gradient and each
    tensor of its state at a time; reading ahead (`pipeline_read`) and writing behind (`pipeline_write`) need as many
    again, each (`runtime/swap_tensor/pipelined_optimizer_swapper.py`).

    Args:
        zero: the section zero_optimization of a DeepSpeed config.
        groups: settings of the optimizer, of every parameter group; those left out have their defaults.
        source: what messages call the config.

    Raises:
        ValueError: with the setting and the reason.
    """
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") != "nvme":
        return
    tensors = 0
    for group in groups:
        if INNER in group or "remote_mu" in group:
            raise ValueError(
                f"{source} offloads the optimizer to NVMe, which does not work with RemoteObservation: offload to the "
                "CPU ('offload_optimizer': {'device': 'cpu'})"
            )
        state_dtype = str(group.get("state_dtype")).removeprefix("torch.")
        if state_dtype in ("bfloat16", EIGHT_BIT):
            raise ValueError(
                f"{source} offloads the optimizer to NVMe, which does not work with ARSG's state_dtype "
                f"{state_dtype!r}: DeepSpeed's buffers are fp32, and the state would be, too, from the second update on"
            )
        moments = MOMENTS.get(str(group.get("preconditioner")), MOMENTS["amsgrad"])
        lookahead = group.get("lookahead_k", 0) not in (0, AUTO)
        tensors = max(tensors, 2 + len(moments) + lookahead)
    needed = tensors * (1 + bool(offload.get("pipeline_read")) + bool(offload.get("pipeline_write")))
    count = offload.get("buffer_count", _DEFAULT_BUFFER_COUNT)
    if not isinstance(count, int | float) or count < needed:
        raise ValueError(
            f"{source} needs zero_optimization.offload_optimizer.buffer_count of at least {needed} for NVMe "
            f"(DeepSpeed's default is {_DEFAULT_BUFFER_COUNT}): weights, gradient, {tensors - 2} state tensors"
            f"{', once more for each of pipeline_read and pipeline_write' if needed > tensors else ''}"
        )
