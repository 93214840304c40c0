"""How a DeepSpeed config cuts a model up among the ranks: element counts and dtypes, by DeepSpeed 0.19.8's rules."""

import math
from collections import Counter
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Final

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.swap_tensor.utils import AIO_ALIGNED_BYTES, MIN_AIO_BYTES
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from arsg_dist.deepspeed.settings import AUTO, accumulation_dtype, model_dtype, place_of

FP32: Final = 4
"""Bytes of an element."""
PRECISIONS: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ELEMENTS_PER_ALIGNMENT: Final = 2  # stages 1 and 2 pad a group to this many elements per rank
_BATCH: Final = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class Plan:
    """The numbers of one config, model and world size. The model is one parameter group.

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
        """Whether `parameters` are those of the model, and not one number for all of them."""
        return len(self.parameters) > 1

    @property
    def largest(self) -> int:
        """Elements of the largest tensor; 0 if the tensors are not known."""
        return max(self.parameters) if self.tensors_known else 0

    @cached_property
    def share(self) -> int:
        """Elements of the model that one rank updates, with padding."""
        if self.stage == 0:
            return self.total
        if self.stage == 3:
            return sum(size * count for size, count in self.sub_groups.items())
        aligned = _ELEMENTS_PER_ALIGNMENT * self.world_size
        return _ELEMENTS_PER_ALIGNMENT * math.ceil(self.total / aligned)

    @property
    def padded(self) -> int:
        """Elements of the model over all ranks, with padding."""
        return self.total if self.stage == 0 else self.share * self.world_size

    @cached_property
    def sub_groups(self) -> Counter[int]:
        """Stage 3: the model is updated, and swapped to NVMe, in these parts: elements on one rank → how many parts."""
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
        """Elements on one rank of the tensors of each sub-group."""
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
        """Elements of this rank's part whose optimizer state lies on NVMe."""
        return sum(size * count for size, count in self.sub_groups.items() if self._is_swapped(size))

    @cached_property
    def swapped_gradients(self) -> int:
        """Elements of this rank's part whose fp32 gradients lie on NVMe: those of large tensors, but for their ends."""
        if not self.tensors_known:
            return self.swapped
        swapped = [group for group in self._tensors_of_sub_groups() if self._is_swapped(sum(group))]
        return sum(size for group in swapped for size in group if self._is_swapped(size))

    @cached_property
    def touched(self) -> int:
        """Stages 1 and 2: elements of the tensors that a rank's part has at least one element of."""
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
        """Bytes of a buffer for so many elements of so many bytes, which is read from NVMe and written to it."""
        alignment: int = self._swap_alignment // size
        return math.ceil(elements / alignment) * alignment * size


def _accumulation_steps(config: dict[str, Any], world_size: int) -> int:
    """Micro-batches per update, worked out by DeepSpeed itself from what the config has of the three sizes."""
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
