"""Explain what a DeepSpeed config does with ARSG: memory, communication, refusals.

The rules are those of DeepSpeed 0.19.8 (its `runtime/zero`); the tests count bytes and messages of real jobs against
them. ZeRO's own account of memory and communication is in its paper, arXiv 1910.02054, sections 5 and 7.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from arsg_dist.deepspeed.config.footprint import FP32, PRECISIONS, Memory, Plan, memory_of
from arsg_dist.deepspeed.config.resolve import check_config
from arsg_dist.deepspeed.config.rules import AUTO
from arsg_dist.deepspeed.config.side_effects import check_overwritten, side_effects
from arsg_dist.optim import ARSG, RemoteObservation
from arsg_dist.optim.base_iterate import MOVEMENT
from arsg_dist.optim.by_name import NAMES, make_optimizer
from arsg_dist.optim.hyperparameters import EIGHT_BIT, STATE_DTYPES
from arsg_dist.optim.state import MOMENTS
from arsg_dist.safe_io.text import printable


@dataclass(frozen=True)
class Message:
    """Describe a collective on data of the whole model, possibly in several pieces.

    Attributes:
        what: which data.
        operation: all_reduce, reduce_scatter or all_gather.
        times: per weight update.
        most_times: as `times`, or more where DeepSpeed decides as it goes.
        bytes: of the whole data, over all ranks.
        sent: bytes that each rank sends per weight update over a ring, with `times`.
    """

    what: str
    operation: str
    times: int
    most_times: int
    bytes: int
    sent: int


@dataclass(frozen=True)
class Explanation:
    """Hold what a config does; `refused` says why it does nothing.

    Attributes:
        stage: of ZeRO.
        precision: of the model: fp32, bf16, fp16.
        world_size: number of ranks.
        parameters: elements of the model that are trained.
        memory: per rank.
        communication: per weight update.
        notes: what else is worth knowing.
        refused: the reason, or None.
    """

    stage: int
    precision: str
    world_size: int
    parameters: int
    memory: tuple[Memory, ...]
    communication: tuple[Message, ...]
    notes: tuple[str, ...]
    refused: str | None


def explain(config: dict[str, Any], *, parameters: Sequence[int], world_size: int) -> Explanation:
    """Work out what a config will do, without starting anything.

    Args:
        config: content of a DeepSpeed config; values may be "auto", which then count as left out.
        parameters: numbers of elements of the trained tensors of the model, in order; one number for all of them also
            works, without what depends on single tensors (padding of stage 3, parameters it keeps whole, buffers for
            the largest).
        world_size: number of ranks.

    Raises:
        ValueError: parameters or world_size are not positive.
    """
    if not parameters or min(parameters) < 1 or world_size < 1:
        raise ValueError("give the number of parameters and a world size, both at least 1")
    total = sum(parameters)
    try:
        check_config(config, "the config")
        check_overwritten(config, "the config")
        zero = DeepSpeedZeroConfig(**_without_auto(config.get("zero_optimization") or {}))
        plan = Plan(config, zero, tuple(parameters), world_size)
        state = _state_bytes(config)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return Explanation(0, "", world_size, total, (), (), (), f"zero_optimization: {reasons}")
    except (ValueError, TypeError, AssertionError) as error:  # DeepSpeed's own checks are assertions
        return Explanation(0, "", world_size, total, (), (), (), str(error))
    return Explanation(
        plan.stage,
        PRECISIONS[plan.dtype],
        world_size,
        total,
        memory_of(plan, state),
        tuple(_communication(plan)),
        tuple(notes_on(config, plan)),
        None,
    )


def _communication(plan: Plan) -> list[Message]:
    """List what is sent for one weight update, messages of a few bytes left out."""
    if plan.world_size == 1:
        return []
    gradients = plan.sent_bytes * (plan.padded if plan.bf16_optimizer else plan.total)
    weights = plan.model_bytes * plan.padded
    often = plan.accumulation
    if plan.stage == 0:
        return [_message(plan, "gradients", "all_reduce", 1, gradients)]
    if plan.stage < 3:
        reduce = often if plan.stage == 2 else 1
        # To the owners only (in DeepSpeed: reduce), which costs a ring as much as a reduce_scatter.
        operation = "all_reduce" if plan.zero.use_multi_rank_bucket_allreduce else "reduce_scatter"
        return [
            _message(plan, "gradients", operation, reduce, gradients),
            _message(plan, "updated parameters", "all_gather", 1, weights),
        ]
    return [
        _message(plan, "parameters", "all_gather", often, weights, most_times=2 * often),
        _message(plan, "gradients", "reduce_scatter", often, plan.sent_bytes * plan.padded),
    ]


def _message(
    plan: Plan, what: str, operation: str, times: int, size: int, most_times: int | None = None
) -> Message:
    passes = 2 if operation == "all_reduce" else 1
    sent = times * passes * size * (plan.world_size - 1) // plan.world_size
    return Message(what, operation, times, most_times or times, size, sent)


def _state_bytes(config: dict[str, Any]) -> dict[str, int]:
    """Count bytes per element of m, v, v̂ and slow weights, as the settings need them."""
    section = config.get("optimizer") or {}
    if section.get("type") == RemoteObservation.__name__:
        return _bytes_after_a_step(_without_auto(section.get("params") or {}))
    params = section.get("params") or {} if section.get("type") in ("ARSG", AUTO) else {}
    params = {} if params == AUTO else _without_auto(params)
    settings = ARSG([torch.zeros(1)], **params).defaults  # refuses what ARSG refuses
    dtype = settings["state_dtype"]
    size = FP32 if dtype is None else 1 if dtype == EIGHT_BIT else STATE_DTYPES[dtype].itemsize
    names = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "v̂"}
    kept = {names[key]: size for key in MOMENTS[settings["preconditioner"]]}
    return kept | ({"slow weights (lookahead)": FP32} if settings["lookahead_k"] else {})


def _bytes_after_a_step(params: dict[str, Any]) -> dict[str, int]:
    """Count what a RemoteObservation and its inner optimizer keep per element, by a step of two elements."""
    probe = torch.nn.Parameter(torch.zeros(2))
    probe.grad = torch.ones(2)
    optimizer = make_optimizer(
        RemoteObservation.__name__, params, [probe], where="the DeepSpeed config's optimizer"
    )
    optimizer.step()
    names = {MOVEMENT: "d (average movement)"}
    return {
        names.get(entry, entry): value.element_size()
        for entry, value in optimizer.state[probe].items()
        if isinstance(value, torch.Tensor) and value.shape == probe.shape
    }


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value != AUTO}


def notes_on(config: dict[str, Any], plan: Plan) -> Iterator[str]:
    """Say which settings do something unexpected, and what the figures leave out.

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
    if section.get("type") not in (*NAMES, AUTO):
        yield (
            f"the optimizer is {printable(section['type'])}, not ARSG: the bytes below are ARSG's"
            if "type" in section
            else "there is no optimizer section: the program has to pass an ARSG"
        )
    params = section.get("params") or {}
    arsg = isinstance(params, dict) and section.get("type") != RemoteObservation.__name__
    betas = params.get("betas") if arsg else None
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
