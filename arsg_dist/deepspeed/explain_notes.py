"""What a reader of a DeepSpeed config should know about it, in sentences."""

from collections.abc import Iterator
from typing import Any

from arsg_dist.deepspeed.explain_plan import PRECISIONS, Plan
from arsg_dist.deepspeed.settings import AUTO
from arsg_dist.deepspeed.side_effects import side_effects
from arsg_dist.safe_io.text import printable


def notes_on(config: dict[str, Any], plan: Plan) -> Iterator[str]:
    """Settings that do something else, or less, than one would think, and what the figures leave out.

    Args:
        config: content of the config, checked.
        plan: of the config.
    """
    zero, stage = plan.zero, plan.stage
    if stage and not plan.tensors_known:
        yield (
            "the bytes are at least these: the sizes of single tensors are not known, and what depends on them is left "
            "out (padding, small parameters kept whole, buffers for the largest): name the model with --model"
        )
    clip = config.get("gradient_clipping")
    if clip is None:
        yield (
            "gradient_clipping is not set, and DeepSpeed then clips the gradient at norm 1.0 (arsg-imagenet writes its "
            'recipe\'s value instead): write "gradient_clipping": 0.0 for none'
        )
    elif clip != AUTO:
        yield f"the gradient is clipped at norm {printable(clip)}" if clip else "the gradient is not clipped"
    section = config.get("optimizer") or {}
    if section.get("type") not in ("ARSG", AUTO):
        yield (
            f"the optimizer is {printable(section['type'])}, not ARSG: the bytes below are ARSG's"
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
    elif betas in ([0.9, 0.999], (0.9, 0.999)):
        yield "betas are Adam's (0.9, 0.999); ARSG's own are (0.999, 0.99): leave them out"
    if stage and zero.reduce_bucket_size > plan.total:
        yield (
            f"reduce_bucket_size, {int(zero.reduce_bucket_size):,} elements, is larger than the model: a smaller one "
            "saves memory"
        )
    if 0 < stage < 3 and zero.use_multi_rank_bucket_allreduce:
        yield (
            "DeepSpeed all-reduces the gradients, where ZeRO's paper reduce-scatters them: half as much again is sent "
            'per update; "use_multi_rank_bucket_allreduce": false reduces to the owners only, in more messages'
        )
    yield from side_effects(config)
    scheduler = config.get("scheduler")
    if scheduler:
        yield f"schedule: {_described(scheduler)}, stepped once per weight update"
    auto = sorted(_keys_with_auto(config))
    if auto:
        yield f"the program has to fill in: {printable(', '.join(auto), limit=2000)}"
    if any(key.endswith("16.enabled") for key in auto):
        yield f"the precision is left to the program, and counted as {PRECISIONS[plan.dtype]} here"


def _keys_with_auto(section: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        members = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(members, dict):
            yield from _keys_with_auto(members, f"{prefix}{key}.")
        elif value == AUTO:
            yield f"{prefix}{key}"


def _described(section: Any) -> str:
    if not isinstance(section, dict):
        return printable(section)
    kind, params = printable(section.get("type")), section.get("params")
    members = params.get("schedulers") if isinstance(params, dict) else None
    if not isinstance(members, list) or not members:
        return kind
    return f"{kind} of {' and '.join(map(_described, members))}"
