"""What a reader of a DeepSpeed config should know about it, in sentences."""

from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

from arsg_dist.deepspeed.refusals import AUTO


def notes_on(config: dict[str, Any], stage: int, zero: DeepSpeedZeroConfig, parameters: int) -> Iterator[str]:
    """Settings that do something else, or less, than one would think.

    Args:
        config: content of the config, checked.
        stage: of ZeRO.
        zero: its `zero_optimization` section, with defaults.
        parameters: elements of the model.
    """
    clip = config.get("gradient_clipping")
    if clip is None:
        yield (
            "gradient_clipping is not set, and DeepSpeed then clips the gradient at norm 1.0 (arsg-imagenet writes its "
            'recipe\'s value instead): write "gradient_clipping": 0.0 for none'
        )
    elif clip != AUTO:
        yield f"the gradient is clipped at norm {clip}" if clip else "the gradient is not clipped"
    section = config.get("optimizer") or {}
    if section.get("type") not in ("ARSG", AUTO):
        yield (
            f"the optimizer is {section['type']}, not ARSG: the bytes below are ARSG's"
            if "type" in section
            else "there is no optimizer section: the program has to pass an ARSG"
        )
    params = section.get("params") or {}
    betas = params.get("betas") if isinstance(params, dict) else None
    if betas == AUTO:
        yield (
            "betas are \"auto\": Hugging Face's Trainer then writes Adam's (0.9, 0.999); leave betas out for ARSG's "
            "(0.999, 0.99)"
        )
    elif betas is not None and list(betas) == [0.9, 0.999]:
        yield "betas are Adam's (0.9, 0.999); ARSG's own are (0.999, 0.99): leave them out"
    if stage and zero.reduce_bucket_size > parameters:
        yield (
            f"reduce_bucket_size, {int(zero.reduce_bucket_size):,} elements, is larger than the model: a smaller one "
            "saves memory"
        )
    if 0 < stage < 3 and zero.use_multi_rank_bucket_allreduce:
        yield (
            "DeepSpeed all-reduces the gradients, where ZeRO's paper reduce-scatters them: half as much again is sent "
            'per update; "use_multi_rank_bucket_allreduce": false reduces to the owners only, in more messages'
        )
    scheduler = config.get("scheduler")
    if scheduler:
        yield f"schedule: {_described(scheduler)}, stepped once per weight update"
    auto = [key for key in sorted(config) if config[key] == AUTO]
    auto += [f"optimizer.{key}" for key in ("type", "params") if section.get(key) == AUTO]
    if auto:
        yield f"the program has to fill in: {', '.join(auto)}"


def place_of(offload: Any) -> str:
    """Where an offload section puts things: "device", "cpu" or "nvme".

    Args:
        offload: `offload_optimizer` or `offload_param` of a `DeepSpeedZeroConfig`, or None.
    """
    device = "none" if offload is None else OffloadDeviceEnum(offload.device).value
    return "device" if device == "none" else device


def _described(section: dict[str, Any]) -> str:
    params = section.get("params")
    members = params.get("schedulers") if isinstance(params, dict) else None
    if not members:
        return str(section["type"])
    return f"{section['type']} of {' and '.join(_described(member) for member in members)}"
