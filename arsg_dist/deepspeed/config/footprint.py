"""Work out how DeepSpeed 0.19.8 cuts a model up, and what memory one rank needs."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Final

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.swap_tensor.utils import AIO_ALIGNED_BYTES, MIN_AIO_BYTES
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from arsg_dist.deepspeed.config.rules import AUTO, accumulation_dtype, model_dtype, place_of

FP32: Final = 4
"""Bytes of an element."""
PRECISIONS: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ELEMENTS_PER_ALIGNMENT: Final = 2  # stages 1 and 2 pad a group to this many elements per rank
_BATCH: Final = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class Plan:
    """Work out element counts and dtypes of one config, model and world size.

    The model is one parameter group.

    Args:
        config: content of the config, checked.
        zero: its section zero_optimization, with defaults.
        parameters: numbers of elements of the trained tensors, in order; a single one stands for tensors not known.
        world_size: number of ranks.

    Raises:
        ValueError: batch sizes that do not fit together.
    """

    def __init__(
        self, config: dict[str, Any], zero: DeepSpeedZeroConfig, parameters: tuple[int, ...], world_size: int
    ) -> None:
        self.zero, self.parameters, self.world_size = zero, parameters, world_size
        self.stage = int(zero.stage)
        self.dtype, accumulated = model_dtype(config), accumulation_dtype(config)
        self.model_bytes, self.gradient_bytes = self.dtype.itemsize, accumulated.itemsize
        sent_as = config.get("communication_data_type")
        self.sent_bytes = {None: self.model_bytes, AUTO: self.model_bytes, "fp32": FP32}.get(sent_as, 2)
        self.place = place_of(zero.offload_optimizer)
        self.separate_accumulation = accumulated != self.dtype
        self.bf16_optimizer = (
            self.stage == 1
            and self.dtype == torch.bfloat16
            and accumulated == torch.float32
            and self.place != "cpu"
        )
        self.accumulation = _accumulation_steps(config, world_size)
        aio = {**AIO_DEFAULT_DICT, **(config.get("aio") or {})}
        self._smallest_swapped: int = max(MIN_AIO_BYTES, aio["block_size"])
        self._swap_alignment: int = AIO_ALIGNED_BYTES * aio["intra_op_parallelism"]
        self.total = sum(parameters)

    @property
    def tensors_known(self) -> bool:
        """Tell whether `parameters` are the model's, and not one number for all of them."""
        return len(self.parameters) > 1

    @property
    def largest(self) -> int:
        """Count the elements of the largest tensor; 0 if the tensors are not known."""
        return max(self.parameters) if self.tensors_known else 0

    @cached_property
    def share(self) -> int:
        """Count the elements of the model that one rank updates, with padding."""
        if self.stage == 0:
            return self.total
        if self.stage == 3:
            return sum(size * count for size, count in self.sub_groups.items())
        aligned = _ELEMENTS_PER_ALIGNMENT * self.world_size
        return _ELEMENTS_PER_ALIGNMENT * math.ceil(self.total / aligned)

    @property
    def padded(self) -> int:
        """Count the elements of the model over all ranks, with padding."""
        return self.total if self.stage == 0 else self.share * self.world_size

    @cached_property
    def sub_groups(self) -> Counter[int]:
        """Count stage 3's sub-groups, updated and swapped as one, by elements on one rank."""
        if self.tensors_known:
            return Counter(map(sum, self._tensors_of_sub_groups()))
        # A sub-group ends where a tensor does, and so can be longer by one.
        limit = self._sub_group_limit
        full, rest = divmod(math.ceil(self.total / self.world_size), limit)
        return +Counter({limit: full, rest: 1})  # without parts of which there are none

    @property
    def _sub_group_limit(self) -> int:
        return max(int(self.zero.sub_group_size), 1)

    def _tensors_of_sub_groups(self) -> list[list[int]]:
        """List the elements on one rank of the tensors of each sub-group."""
        groups: list[list[int]] = [[]]
        for numel in self.parameters:
            if sum(groups[-1]) >= self._sub_group_limit:
                groups.append([])
            groups[-1].append(math.ceil(numel / self.world_size))
        return groups

    def _is_swapped(self, elements: int) -> bool:
        return self.place == "nvme" and elements * FP32 >= self._smallest_swapped

    @cached_property
    def swapped(self) -> int:
        """Count the elements of this rank's part whose optimizer state lies on NVMe."""
        return sum(size * count for size, count in self.sub_groups.items() if self._is_swapped(size))

    @cached_property
    def swapped_gradients(self) -> int:
        """Count the elements of this rank's part whose fp32 gradients lie on NVMe.

        Those of large tensors do, but for their ends.
        """
        if not self.tensors_known:
            return self.swapped
        swapped = [group for group in self._tensors_of_sub_groups() if self._is_swapped(sum(group))]
        return sum(size for group in swapped for size in group if self._is_swapped(size))

    @cached_property
    def touched(self) -> int:
        """Count, for stages 1 and 2, the elements of tensors that a rank's part touches."""
        if not self.tensors_known:  # a part, and up to two tensors more
            return self.share
        largest = 0
        for rank in range(self.world_size):
            begin, end, position, touched = rank * self.share, (rank + 1) * self.share, 0, 0
            for numel in self.parameters:
                if position < end and position + numel > begin:
                    touched += numel
                position += numel
            largest = max(largest, touched)
        return largest

    def aligned(self, elements: int, size: int) -> int:
        """Return the bytes of a buffer for NVMe.

        Args:
            elements: how many it holds.
            size: bytes of each.
        """
        alignment: int = self._swap_alignment // size
        return math.ceil(elements / alignment) * alignment * size


def _accumulation_steps(config: dict[str, Any], world_size: int) -> int:
    """Have DeepSpeed work out the micro-batches per update from the three batch sizes."""
    sizes = {name: None if config.get(name) == AUTO else config.get(name) for name in _BATCH}
    if sizes["train_batch_size"] is None and sizes["train_micro_batch_size_per_gpu"] is None:
        return int(sizes["gradient_accumulation_steps"] or 1)  # the program has to say how large a batch is
    completed: Any = SimpleNamespace(**sizes, world_size=world_size)
    try:
        DeepSpeedConfig._set_batch_related_parameters(completed)
        DeepSpeedConfig._batch_assertion(completed)
    except (AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"the batch sizes do not fit a world size of {world_size}: {error}") from None
    return int(completed.gradient_accumulation_steps)


BACKWARD: Final = "during the backward pass"
UPDATE: Final = "during the update"


@dataclass(frozen=True)
class Memory:
    """Count bytes on one rank, the one with most.

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
    """List what one rank holds because of the model's size, without activations.

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
    """Count the flat copy of a bucket's gradients that is sent."""
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
