"""Check that all ranks update with the same settings.

A schedule that follows a loss (`ReduceLROnPlateau`) and is fed with each rank's own sets other learning rates on every
rank, and the replicas drift apart, or the shards.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor
from torch.optim import Optimizer

from arsg_dist.horovod.comm.process_groups import Group

_RELATIVE_VARIANCE = 1e-12
_NAMED = 8
_RECORDED = "base_iterate_scale"
"""No setting but what ARSG notes of its last step, which a rank that holds nothing of a group does not make."""


@contextmanager
def same_settings(optimizer: Optimizer, process_set: Any, name: str) -> Iterator[None]:
    """Compare the settings of all ranks' parameter groups during a block. Collective.

    The block exchanges what an update needs; the comparison of numbers goes on meanwhile.

    Args:
        optimizer: whose settings (those that its class has defaults for) are compared.
        process_set: the ranks.
        name: precedes the names of operations, the same on all ranks.

    Raises:
        RuntimeError: they differ, after the block and on every rank; it names the ranks.
    """
    if not process_set.included() or process_set.size() == 1:
        yield
        return
    mine = [value for _, value in _numbers(optimizer)]
    # Sums, to which a rank that has joined adds nothing: among n equal numbers, n times the sum of their squares is
    # the square of their sum. Not bit by bit: the C libraries of two hosts may differ in the last digit of a cosine.
    sent = torch.tensor([1.0, *mine, *(value * value for value in mine)], dtype=torch.float64)
    handle = hvd.allreduce_async(sent, op=hvd.Sum, name=f"{name}.settings", process_set=process_set)
    found = ""
    try:
        yield
    finally:  # also where the block failed: the other ranks ask this one
        ranks, *sums = hvd.synchronize(handle).tolist()
        if not all(
            map(_are_squares_of_one_number, sums[: len(mine)], sums[len(mine) :], [ranks] * len(mine))
        ):
            found = "on some ranks"
            if ranks == process_set.size():  # else some have joined, and do not answer
                numbers = list(_numbers(optimizer))
                found = _differences(
                    Group(process_set, name).all_gather_object(numbers, "different_settings")
                )
    if found:
        raise RuntimeError(
            f"the settings of this update differ between the ranks: {found}. A schedule that follows a loss needs the "
            "same one on every rank: scheduler.step(hvd.allreduce(loss))"
        )


def _are_squares_of_one_number(total: float, squares: float, ranks: float) -> bool:
    return ranks * squares - total * total <= _RELATIVE_VARIANCE * ranks * squares


def _numbers(optimizer: Optimizer) -> Iterator[tuple[str, float]]:
    """Yield names and values, as many on every rank."""
    for index, group in enumerate(optimizer.param_groups):
        for setting in optimizer.defaults:
            if setting == _RECORDED:
                continue
            value = group.get(setting)
            for member in value if isinstance(value, (tuple, list)) else (value,):
                yield f"{setting} of group {index}", _number(member)


def _number(value: Any) -> float:
    """Return what is compared: nothing of texts and of an accelerator's tensors."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    return float(value) if isinstance(value, Real) and math.isfinite(value) else 0.0


def _differences(of_ranks: list[list[tuple[str, float]]]) -> str:
    found = []
    for values in zip(*of_ranks, strict=True):
        expected = values[0][1]
        others = [
            f"{value:g} on rank {rank}"
            for rank, (_, value) in enumerate(values)
            if not math.isclose(value, expected, rel_tol=1e-6)
        ]
        if others:
            more = [f"and other values on {len(others) - _NAMED} more"] if len(others) > _NAMED else []
            found.append(f"{values[0][0]} is {expected:g} on rank 0, {', '.join([*others[:_NAMED], *more])}")
    return "; ".join(found)
