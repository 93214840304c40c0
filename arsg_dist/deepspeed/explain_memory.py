"""What one rank holds because of the model's size, under DeepSpeed 0.19.8."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE

from arsg_dist.deepspeed.explain_plan import FP32, Plan
from arsg_dist.deepspeed.settings import place_of

BACKWARD: Final = "during the backward pass"
UPDATE: Final = "during the update"


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, those of the rank with most.

    Attributes:
        what: parameters, gradients, fp32 masters, m, v, v̂, ...
        bytes: how many.
        where: "device", "cpu" or "nvme".
        note: when they are there, if not always; or empty.
    """

    what: str
    bytes: int
    where: str = "device"
    note: str = ""


def memory_of(plan: Plan, state: Mapping[str, int]) -> tuple[Memory, ...]:
    """Everything one rank holds because of the model's size; activations are not in it.

    Args:
        plan: of the config.
        state: bytes per element of m, v, v̂, ...
    """
    found = (*_parameters(plan), *_updated(plan, state), *_gradients(plan), *_sent(plan))
    return tuple(entry for entry in found if entry.bytes)


def _parameters(plan: Plan) -> Iterator[Memory]:
    if plan.stage < 3:
        yield Memory("parameters", plan.model_bytes * plan.padded)
        return
    offload = plan.zero.offload_param
    where = place_of(offload)
    kept = min(plan.share, int(offload.max_in_cpu)) if where == "nvme" else 0
    yield Memory("parameters", plan.model_bytes * (plan.share - kept), where, "this rank's part")
    if where == "nvme":
        yield Memory("parameters", plan.model_bytes * kept, "cpu", "this rank's part, up to max_in_cpu")
        size = offload.buffer_count * plan.aligned(int(offload.buffer_size), plan.model_bytes)
        yield Memory("parameter buffers", size, "cpu", "buffer_count × buffer_size")
    limit = plan.zero.param_persistence_threshold
    whole = sum(numel for numel in plan.parameters if numel <= limit) if plan.tensors_known else 0
    yield Memory(
        "small parameters", plan.model_bytes * whole, note=f"kept whole, up to {limit:,} elements each"
    )


def _updated(plan: Plan, state: Mapping[str, int]) -> Iterator[Memory]:
    masters = {"fp32 masters": FP32} if plan.stage or plan.model_bytes != FP32 else {}
    for what, size in {**masters, **state}.items():
        if plan.place != "nvme":
            yield Memory(what, size * plan.share, plan.place)
            continue
        yield Memory(what, size * plan.swapped, "nvme")
        yield Memory(what, size * (plan.share - plan.swapped), "cpu", "sub-groups too small to be swapped")
    if plan.place == "nvme":
        size = plan.zero.offload_optimizer.buffer_count * plan.aligned(max(plan.sub_groups), FP32)
        yield Memory("swap buffers", size, "cpu", "buffer_count × the largest sub-group")


def _gradients(plan: Plan) -> Iterator[Memory]:
    if plan.stage == 0:
        yield Memory("gradients", plan.model_bytes * plan.total, note="until the update")
        if plan.model_bytes != FP32:
            yield Memory("gradients, fp32", FP32 * plan.total, note=UPDATE)
        return
    if plan.bf16_optimizer:
        yield Memory("gradients, fp32", plan.gradient_bytes * plan.padded)
        yield Memory("gradients", plan.model_bytes * plan.total, note=BACKWARD)
        return
    yield from _buckets(plan)
    if plan.stage == 3:
        where = "device" if plan.place == "device" else "cpu"
        yield Memory("gradients", plan.gradient_bytes * plan.share, where, "this rank's part")
    else:
        yield from _gradients_of_stages_1_and_2(plan)
    if plan.place == "device":
        if plan.stage == 3 or not _accumulates_its_part_in_fp32(plan):
            part = max(plan.sub_groups) if plan.stage == 3 else plan.share
            yield Memory("gradients, fp32", FP32 * part, note=UPDATE)
        return
    yield Memory("gradients, fp32", FP32 * (plan.share - plan.swapped_gradients), "cpu")
    yield Memory("gradients, fp32", FP32 * plan.swapped_gradients, "nvme", "until the update")


def _sent(plan: Plan) -> Iterator[Memory]:
    """What goes out is a flat copy of the gradients of a bucket."""
    if plan.world_size == 1:
        return
    by_bucket = plan.stage and not plan.bf16_optimizer
    most = int(plan.zero.reduce_bucket_size) if by_bucket else MEMORY_OPT_ALLREDUCE_SIZE
    yield Memory("gradients on their way", plan.sent_bytes * min(most, plan.padded), note=BACKWARD)


def _buckets(plan: Plan) -> Iterator[Memory]:
    if not (plan.zero.contiguous_gradients or (plan.stage < 3 and plan.place == "cpu")):
        return
    count = 2 if plan.zero.overlap_comm and plan.stage < 3 else 1
    size = {1: plan.gradient_bytes, 2: plan.model_bytes, 3: plan.sent_bytes}[plan.stage]
    note = f"reduce_bucket_size × {count}" + ("" if plan.stage == 3 else f", {BACKWARD}")
    yield Memory("gradient buckets", count * int(plan.zero.reduce_bucket_size) * size, note=note)


def _accumulates_its_part_in_fp32(plan: Plan) -> bool:
    return plan.separate_accumulation and plan.gradient_bytes == FP32


def _gradients_of_stages_1_and_2(plan: Plan) -> Iterator[Memory]:
    if plan.stage == 1:
        yield Memory("gradients", plan.gradient_bytes * plan.total, note="at most, until they are reduced")
    if _accumulates_its_part_in_fp32(plan):
        yield Memory("gradients", FP32 * plan.share, note="this rank's part, until the update")
    elif plan.stage == 2 and plan.place == "device":
        yield Memory("gradients", plan.gradient_bytes * plan.touched, note="at most, until the update")
    if plan.place == "device":
        return
    if plan.stage == 2 and plan.accumulation > 1 and not _accumulates_its_part_in_fp32(plan):
        yield Memory("gradients", plan.model_bytes * plan.touched, "cpu", "accumulated")
    yield Memory("weights, updated", plan.model_bytes * plan.share, "cpu", "on their way to the device")
    for where in ("cpu", "device"):
        yield Memory("a gradient on its way", plan.model_bytes * plan.largest, where, "the largest tensor's")
