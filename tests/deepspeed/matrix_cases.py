"""Which configurations are tested, and which of them every test run can afford."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from tests.deepspeed.matrix import CLIP, Case
from tests.support.turns import part_of

LOOKAHEAD = (("lookahead_k", 2), ("betas", (0.9, 0.99)))
MANY_MICRO_BATCHES = Case(1, "bf16-fp32grads", accumulation=4, groups="several", sent="fp32")
PRECISIONS = ("fp32", "bf16", "bf16-fp32grads", "fp16")
ACTIVATIONS = ("torch", "torch-reentrant", "deepspeed")


def cases(selection: str = "all") -> Iterator[Case]:
    """The configurations: "all", the "core" that every test run can afford, or a part of all."""
    if selection == "core":
        yield from dict.fromkeys((*_core(), *_core_offloaded(), *_core_with_options()))
        return
    everything = (*_all(), *_all_offloaded(), *_with_options())
    yield from everything if selection == "all" else part_of(everything, selection)


def _core() -> Iterator[Case]:
    """Every stage × precision once; every two of stage, precision and how the gradient comes together.

    Not clipped where gradients are accumulated: clipping hides gradients of a wrong size.
    """
    for stage, (number, precision) in itertools.product(range(4), enumerate(PRECISIONS)):
        if (stage, precision) != (0, "bf16-fp32grads"):
            accumulation, clip, groups = (1, CLIP, "one") if (stage + number) % 2 else (2, 0.0, "several")
            yield Case(stage, precision, accumulation, clip, groups)
    yield Case(0, "fp16", accumulation=2, groups="several", overflow=True)
    yield MANY_MICRO_BATCHES


def _core_offloaded() -> Iterator[Case]:
    """Every stage, every precision and every place once, with everything that varies between the stages."""
    for stage, precision in ((1, "bf16"), (1, "bf16-fp32grads"), (2, "fp16"), (3, "fp32")):
        yield Case(stage, precision, 2, 0.0, "several", overflow=precision == "fp16", offload="cpu")
    yield Case(2, "bf16", 1, CLIP, "several", offload="cpu-unpinned")
    yield Case(3, "bf16", 2, 0.0, "several", offload="cpu-and-parameters")
    yield Case(3, "bf16", 2, 0.0, "several", offload="nvme")


def _core_with_options() -> Iterator[Case]:
    """Every option, every way to keep activations and every further setting once; at stage 3 each way."""
    seen = set[tuple[Any, ...]]()
    kept = zip(ACTIVATIONS, range(3), strict=True)
    activations = {*((stage, way) for way, stage in kept), *((3, way) for way in ACTIVATIONS)}
    for number, case in enumerate(_with_options()):
        if case.activations:
            chosen = (case.stage, case.activations) in activations
        else:
            varied = (case.options, case.settings, case.offload, case.stage == 3)
            chosen = varied not in seen and (case.stage != 1 or number % 2 == 0)
            seen |= {varied} if chosen else set()
        if chosen:
            yield case


def _with_options() -> Iterator[Case]:
    """Each option of ZeRO away from its default, with everything that varies between micro-batches."""
    for stage in (1, 2):
        for name, value in (
            ("overlap_comm", True),
            ("contiguous_gradients", False),
            ("reduce_scatter", False),
            ("round_robin_gradients", True),
            ("reduce_bucket_size", 1000),
            ("allgather_bucket_size", 1000),
        ):
            yield Case(stage, "bf16", 2, 0.0, "several", options=((name, value),))
        yield Case(
            stage, "bf16", 2, 0.0, "several", offload="cpu", options=(("round_robin_gradients", True),)
        )
        yield Case(stage, "bf16", 2, 0.0, "several", offload="cpu", options=(("overlap_comm", True),))
    for name, value in (
        ("overlap_comm", False),
        ("contiguous_gradients", False),
        ("reduce_scatter", False),
        ("sub_group_size", 10**9),
        ("reduce_bucket_size", 1000),
        ("stage3_param_persistence_threshold", 0),
        ("stage3_prefetch_bucket_size", 0),
        ("stage3_max_live_parameters", 0),
        ("stage3_max_reuse_distance", 0),
    ):
        yield Case(3, "bf16", 2, 0.0, "several", options=((name, value),))
    for stage, activations in itertools.product(range(4), ACTIVATIONS):
        yield Case(stage, "bf16", 2, 0.0, "several", activations=activations)
    for stage in (1, 2, 3):
        yield Case(stage, "fp32", 2, 0.0, "several", settings=(("state_dtype", "bfloat16"),))
        for offload in ("", "cpu"):
            yield Case(stage, "fp32", 2, 0.0, "several", offload=offload, settings=LOOKAHEAD)


def _all() -> Iterator[Case]:
    for stage, precision, accumulation, clip, groups in itertools.product(
        range(4), PRECISIONS, (1, 2), (0.0, CLIP), ("one", "several")
    ):
        if (stage, precision) != (0, "bf16-fp32grads"):  # DeepSpeed refuses it
            yield Case(stage, precision, accumulation, clip, groups)
    for stage in range(4):
        yield Case(stage, "fp16", accumulation=2, groups="several", overflow=True)
        if stage:
            yield Case(stage, "fp16-fp32grads", accumulation=2, groups="several", overflow=True)
            yield dataclasses.replace(MANY_MICRO_BATCHES, stage=stage)


def _all_offloaded() -> Iterator[Case]:
    for stage, precision, accumulation, clip in itertools.product((1, 2, 3), PRECISIONS, (1, 2), (0.0, CLIP)):
        yield Case(stage, precision, accumulation, clip, "several", offload="cpu")
    for stage in (1, 2, 3):
        yield Case(stage, "bf16", 1, CLIP, "several", offload="cpu-unpinned")
        for precision in ("fp16", "fp16-fp32grads"):
            yield Case(stage, precision, 2, 0.0, "several", overflow=True, offload="cpu")
    for precision in PRECISIONS:
        yield Case(3, precision, 2, 0.0, "several", offload="cpu-and-parameters")
    yield Case(3, "bf16", 2, 0.0, "several", offload="nvme")
    yield Case(3, "fp32", 2, CLIP, "several", offload="nvme-pipelined")
    yield Case(3, "fp16", 2, 0.0, "several", overflow=True, offload="nvme")
    yield Case(3, "fp32", 2, 0.0, "several", offload="nvme-one-more", settings=LOOKAHEAD)
