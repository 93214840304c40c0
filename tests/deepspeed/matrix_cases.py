"""Which configurations are tested, and which of them every test run can afford."""

import dataclasses
import itertools
from collections.abc import Iterator

from tests.deepspeed.matrix import CLIP, Case

LOOKAHEAD = (("lookahead_k", 2), ("betas", (0.9, 0.99)))
MANY_MICRO_BATCHES = Case(1, "bf16-fp32grads", accumulation=4, groups="several", sent="fp32")
PRECISIONS = ("fp32", "bf16", "bf16-fp32grads", "fp16")


def cases(selection: str = "all") -> Iterator[Case]:
    """The configurations: "all", the "core" that every test run can afford, or the "rest"."""
    core = dict.fromkeys((*_core(), *_core_offloaded(), *_with_options()))
    if selection == "core":
        yield from core
        return
    for case in (*_all(), *_all_offloaded(), *_with_options()):
        if selection == "all" or case not in core:
            yield case


def _core() -> Iterator[Case]:
    for case in _all():
        # Not clipped where gradients are accumulated: clipping hides gradients of a wrong size.
        if not case.overflow and (case.accumulation, case.clip, case.groups) in (
            (2, 0.0, "several"),
            (1, CLIP, "one"),
        ):
            yield case
    yield Case(0, "fp16", accumulation=2, groups="several", overflow=True)
    yield MANY_MICRO_BATCHES


def _core_offloaded() -> Iterator[Case]:
    """Every stage × precision once, with everything that varies between them."""
    for stage, precision in itertools.product((1, 2, 3), PRECISIONS):
        if (stage, precision) != (3, "bf16"):
            yield Case(stage, precision, 2, 0.0, "several", overflow=precision == "fp16", offload="cpu")
    yield Case(2, "bf16", 1, CLIP, "several", offload="cpu-unpinned")
    yield Case(3, "bf16", 2, 0.0, "several", offload="cpu-and-parameters")
    yield Case(3, "bf16", 2, 0.0, "several", offload="nvme")


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
    for stage, activations in itertools.product(range(4), ("torch", "torch-reentrant", "deepspeed")):
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
