"""What a DeepSpeed config will do with ARSG: where the bytes are, what is sent, and what is refused.

The rules are those of DeepSpeed 0.19.8 (its `runtime/zero`); the tests count bytes and messages of real jobs against
them. ZeRO's own account of memory and communication is in its paper, arXiv 1910.02054, sections 5 and 7.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from arsg_dist.deepspeed.config import check_config
from arsg_dist.deepspeed.explain_notes import notes_on, place_of
from arsg_dist.deepspeed.refusals import AUTO
from arsg_dist.optim import ARSG
from arsg_dist.optim.settings import STATE_DTYPES
from arsg_dist.optim.state import MOMENTS

_FP32: Final = 4
_ELEMENTS_PER_ALIGNMENT: Final = 2  # stages 1 and 2 pad a group to this many elements per rank


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


@dataclass(frozen=True)
class Message:
    """A collective operation on data of the whole model, possibly in several pieces.

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
    """What a config does; `refused` says why it does nothing.

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
    """Works out what a config will do, without starting anything.

    Args:
        config: content of a DeepSpeed config; values may be "auto", which then count as left out.
        parameters: numbers of elements of the trained tensors of the model, in order; one number for all of them also
            works, without what depends on single tensors (padding of stage 3, parameters it keeps whole).
        world_size: number of ranks.

    Raises:
        ValueError: parameters or world_size are not positive.
    """
    if not parameters or min(parameters) < 1 or world_size < 1:
        raise ValueError("give the number of parameters and a world size, both at least 1")
    total = sum(parameters)
    try:
        check_config(config, "the config")
        zero = DeepSpeedZeroConfig(**_without_auto(config.get("zero_optimization") or {}))
        precision = _precision(config)
        state = _state_bytes(config)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return Explanation(0, "", world_size, total, (), (), (), f"zero_optimization: {reasons}")
    except (ValueError, TypeError) as error:
        return Explanation(0, "", world_size, total, (), (), (), str(error))
    plan = _Plan(config, zero, precision, tuple(parameters), world_size)
    return Explanation(
        plan.stage,
        precision,
        world_size,
        total,
        tuple(plan.memory(state)),
        tuple(plan.communication()),
        tuple(notes_on(config, plan.stage, zero, total)),
        None,
    )


class _Plan:
    """The numbers of one config, model and world size."""

    def __init__(
        self,
        config: dict[str, Any],
        zero: DeepSpeedZeroConfig,
        precision: str,
        parameters: tuple[int, ...],
        world_size: int,
    ) -> None:
        self.zero, self.parameters, self.world_size = zero, parameters, world_size
        self.stage = int(zero.stage)
        self.model_bytes = _FP32 if precision == "fp32" else 2
        accumulation = (config.get("data_types") or {}).get("grad_accum_dtype")
        self.gradient_bytes = _FP32 if accumulation == "fp32" else self.model_bytes
        self.bf16_optimizer = (self.stage, precision, self.gradient_bytes) == (1, "bf16", _FP32)
        sent_as = config.get("communication_data_type")
        self.sent_bytes = {None: self.model_bytes, AUTO: self.model_bytes, "fp32": _FP32}.get(sent_as, 2)
        steps = config.get("gradient_accumulation_steps", 1)
        self.accumulation = 1 if steps == AUTO else int(steps)
        self.total = sum(parameters)

    @property
    def share(self) -> int:
        """Elements of the model that one rank updates, with padding."""
        if self.stage == 0:
            return self.total
        if self.stage == 3:
            return sum(math.ceil(numel / self.world_size) for numel in self.parameters)
        aligned = _ELEMENTS_PER_ALIGNMENT * self.world_size
        return _ELEMENTS_PER_ALIGNMENT * math.ceil(self.total / aligned)

    @property
    def padded(self) -> int:
        """Elements of the model over all ranks, with padding."""
        return self.total if self.stage == 0 else self.share * self.world_size

    def memory(self, state: dict[str, int]) -> list[Memory]:
        """Everything one rank holds because of the model's size; activations are not in it."""
        where = place_of(self.zero.offload_optimizer)
        found = [self._parameters()]
        if self.stage == 3:
            found.append(self._kept_whole())
        if self.stage or self.model_bytes != _FP32:
            found.append(Memory("fp32 masters", _FP32 * self.share, where))
        found += [Memory(name, size * self.share, where) for name, size in state.items()]
        found += self._gradients(where)
        return [entry for entry in found if entry.bytes]

    def _parameters(self) -> Memory:
        if self.stage < 3:
            return Memory("parameters", self.model_bytes * self.padded)
        where = place_of(self.zero.offload_param)
        return Memory("parameters", self.model_bytes * self.share, where, "this rank's part")

    def _kept_whole(self) -> Memory:
        limit = self.zero.param_persistence_threshold
        whole = sum(numel for numel in self.parameters if numel <= limit) if len(self.parameters) > 1 else 0
        return Memory(
            "small parameters", self.model_bytes * whole, note=f"kept whole, up to {limit:,} elements each"
        )

    def _gradients(self, where: str) -> list[Memory]:
        gradients, bucket = self.gradient_bytes, int(self.zero.reduce_bucket_size)
        if self.stage == 0:
            found = [Memory("gradients", self.model_bytes * self.total, note="until the update")]
            if self.model_bytes != _FP32:
                found.append(Memory("gradients, fp32", _FP32 * self.total, note="during the update"))
            return found
        if self.bf16_optimizer:
            return [
                Memory("gradients, fp32", gradients * self.padded),
                Memory("gradients", self.model_bytes * self.total, note="during the backward pass"),
            ]
        buffers = 2 if self.zero.overlap_comm and self.stage < 3 else 1
        note = f"reduce_bucket_size × {buffers}" + ("" if self.stage == 3 else ", during the backward pass")
        found = []
        if self.zero.contiguous_gradients or self.stage == 3:
            found.append(Memory("gradient buckets", buffers * bucket * self.sent_bytes, note=note))
        if where != "device":
            found.append(Memory("gradients, fp32", _FP32 * self.share, "cpu"))
        elif self.stage == 3:
            found.append(Memory("gradients", gradients * self.share, note="this rank's part"))
        elif self.stage == 2 and gradients != self.model_bytes:
            found.append(Memory("gradients", gradients * self.share, note="until the update"))
        else:
            whole = self.stage == 1 and self.accumulation > 1
            count = self.total if whole else self._touched()
            found.append(Memory("gradients", gradients * count, note="at most, until the update"))
        return found

    def _touched(self) -> int:
        """Elements of the tensors that a rank's part has at least one element of."""
        if len(self.parameters) == 1:  # the tensors are not known: a part, and up to two tensors more
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

    def communication(self) -> list[Message]:
        """What is sent for one weight update, messages of a few bytes left out."""
        if self.world_size == 1:
            return []
        gradients = self.sent_bytes * (self.padded if self.bf16_optimizer else self.total)
        weights = self.model_bytes * self.padded
        often = self.accumulation
        if self.stage == 0:
            return [self._message("gradients", "all_reduce", 1, gradients)]
        if self.stage < 3:
            reduce = often if self.stage == 2 else 1
            # To the owners only (in DeepSpeed: reduce), which costs a ring as much as a reduce_scatter.
            operation = "all_reduce" if self.zero.use_multi_rank_bucket_allreduce else "reduce_scatter"
            return [
                self._message("gradients", operation, reduce, gradients),
                self._message("updated parameters", "all_gather", 1, weights),
            ]
        return [
            self._message("parameters", "all_gather", often, weights, most_times=2 * often),
            self._message("gradients", "reduce_scatter", often, self.sent_bytes * self.padded),
        ]

    def _message(
        self, what: str, operation: str, times: int, size: int, most_times: int | None = None
    ) -> Message:
        passes = 2 if operation == "all_reduce" else 1
        sent = times * passes * size * (self.world_size - 1) // self.world_size
        return Message(what, operation, times, most_times or times, size, sent)


def _precision(config: dict[str, Any]) -> str:
    for name in ("fp16", "bf16", "bfloat16"):
        if (config.get(name) or {}).get("enabled") is True:
            return "bf16" if name == "bfloat16" else name
    return "fp32"


def _state_bytes(config: dict[str, Any]) -> dict[str, int]:
    """Bytes per element of m, v, v̂ and the slow weights, as far as the settings need them."""
    section = config.get("optimizer") or {}
    params = section.get("params") or {} if section.get("type") in ("ARSG", AUTO) else {}
    params = {} if params == AUTO else _without_auto(params)
    settings = ARSG([torch.zeros(1)], **params).defaults  # refuses what ARSG refuses
    dtype = settings["state_dtype"]
    size = _FP32 if dtype is None else STATE_DTYPES[dtype].itemsize
    names = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "v̂"}
    kept = {names[key]: size for key in MOMENTS[settings["preconditioner"]]}
    return kept | ({"slow weights (lookahead)": _FP32} if settings["lookahead_k"] else {})


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if value != AUTO}
