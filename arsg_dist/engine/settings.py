"""Check that all ranks update with the same settings.

A schedule that follows a loss (`ReduceLROnPlateau`) and is fed with each rank's own sets other learning rates on every
rank, and the replicas drift apart, or the shards.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from arsg_dist.engine.communicator import Communicator
from arsg_dist.engine.job import JobError

Settings = list[tuple[str, float | str]]
"""Names and values, as many on every rank."""

_RELATIVE_VARIANCE: Final = 1e-12
_NAMED: Final = 8
_NOT_COMPARED: Final = ("base_iterate_scale", "differentiable")
"""No settings: what ARSG notes of its last step, which a rank that holds nothing of a group does not make; and what
torch adds to the defaults of an optimizer that has loaded a state, as rank 0 alone may have done."""


def start_comparison(
    optimizer: Optimizer, communicator: Communicator, complaints: Sequence[str] = ()
) -> Callable[[], None]:
    """Begin to compare the settings of all ranks' parameter groups, in one small message. Collective.

    Args:
        optimizer: whose settings (those that its class has defaults for) are compared.
        communicator: of the ranks that make the update together.
        complaints: what else this rank has found wrong with the update, which all must learn.

    Returns:
        What waits for the answer, and raises JobError on every rank where settings differ, naming the ranks, or one
        complains; every rank must call it before its next collective.
    """
    settings = settings_of(optimizer)
    if communicator.world_size == 1:
        return lambda: _raise([([*complaints], settings)])
    answer = communicator.start_sum(message_of(settings, bool(complaints)))

    def finish() -> None:
        if not agree(answer()):
            _raise(communicator.all_gather_object(([*complaints], settings)))

    return finish


def settings_of(optimizer: Optimizer) -> Settings:
    """List what is compared; nothing of an accelerator's tensors, which would be waited for."""
    return [
        (f"{setting} of group {index}", _plain(member))
        for index, group in enumerate(optimizer.param_groups)
        for setting in optimizer.defaults
        if setting not in _NOT_COMPARED
        for member in _members(group.get(setting))
    ]


def message_of(settings: Settings, bad: bool = False) -> Tensor:
    """Make what every rank sends; the sum over the ranks answers.

    Sums, to which a rank that takes no part (`hvd.join`) adds nothing: among n equal numbers, n times the sum of their
    squares is the square of their sum. Not bit by bit: the C libraries of two hosts may differ in the last digit of a
    cosine.
    """
    mine = [_number(value) for _, value in settings]
    return torch.tensor([1.0, float(bad), *mine, *(number * number for number in mine)], dtype=torch.float64)


def agree(total: Tensor) -> bool:
    """Tell whether those whose messages were added up agree, and none of them is bad."""
    ranks, bad, *sums = total.tolist()
    half = len(sums) // 2
    return bad == 0 and all(
        ranks * squares - numbers * numbers <= _RELATIVE_VARIANCE * ranks * squares
        for numbers, squares in zip(sums[:half], sums[half:], strict=True)
    )


def ranks_of(total: Tensor) -> int:
    """Return how many messages were added up."""
    return int(total[0])


def differences(of_ranks: Sequence[Settings]) -> str:
    """Say which settings differ, with the ranks; "" if none does."""
    found = []
    for values in zip(*of_ranks, strict=True):
        expected = values[0][1]
        others = [
            f"{_text(value)} on rank {rank}"
            for rank, (_, value) in enumerate(values)
            if not math.isclose(_number(value), _number(expected), rel_tol=1e-6)
        ]
        if others:
            more = [f"and other values on {len(others) - _NAMED} more"] if len(others) > _NAMED else []
            found.append(
                f"{values[0][0]} is {_text(expected)} on rank 0, {', '.join([*others[:_NAMED], *more])}"
            )
    return "; ".join(found)


def differ(found: str, averaged: str = "the loss averaged over the ranks") -> JobError:
    """Make the error that every rank raises.

    Args:
        found: what differs.
        averaged: how to write what a schedule that follows a loss should be given.
    """
    return JobError(
        f"the settings of this update differ between the ranks: {found}. A schedule that follows a loss needs the "
        f"same one on every rank: scheduler.step({averaged})"
    )


def _raise(of_ranks: Sequence[tuple[list[str], Settings]]) -> None:
    complaining: dict[str, list[int]] = {}
    for rank, (complaints, _) in enumerate(of_ranks):
        for text in complaints:
            complaining.setdefault(text, []).append(rank)
    if complaining:
        raise JobError(
            "\n".join(
                text
                if len(ranks) == len(of_ranks)
                else f"{text} (on rank {', '.join(map(str, ranks[:_NAMED]))}{' ...' if len(ranks) > _NAMED else ''})"
                for text, ranks in complaining.items()
            )
        )
    if found := differences([settings for _, settings in of_ranks]):
        raise differ(found)


def _members(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _plain(value: Any) -> float | str:
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    if isinstance(value, str):
        return value
    return float(value) if isinstance(value, Real) and math.isfinite(value) else 0.0


def _number(value: float | str) -> float:
    """Make a number also of a text, of a size whose differences count."""
    return float(1 + zlib.crc32(value.encode()) % 9973) if isinstance(value, str) else value


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
