"""What is in the state of an optimizer, sharded or not."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arsg_dist.horovod.partition import Partition

if TYPE_CHECKING:
    from arsg_dist.horovod.shards import Shards

NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})
"""State entries that are one number per parameter though they are tensors: torch.optim's."""
MASTER = "master_params"
"""Key of the fp32 masters in a whole state."""
HELD = "held_by_rank_0"
"""Marks a state without tensors."""
Entries = dict[int, dict[str, tuple[str, Any]]]
"""What state parameters have: name → ("number", value) or ("tensor", dtype)."""


def check_state(named: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if an optimizer has state that cannot be cut up."""
    for name, parameter in named:
        for entry, value in optimizer.state.get(parameter, {}).items():
            is_per_element(name, entry, value, parameter)


def adopt_state(optimizer: "Shards", partition: Partition) -> None:
    """Cuts up the state that the given optimizer had for a partition's parameters."""
    for segment, piece in partition.pieces:
        parameter = partition.parameters[segment.parameter]
        spec = partition.layout.parameters[segment.parameter]
        whole = optimizer._whole_state.get(parameter)
        if whole:
            optimizer._inner.state[piece] = {
                name: (
                    spec.flat(value).narrow(0, segment.parameter_start, segment.numel).clone()
                    if is_per_element(spec.name, name, value, parameter)
                    else copy.deepcopy(value)
                )
                for name, value in whole.items()
            }
    for parameter in partition.parameters:
        optimizer._whole_state.pop(parameter, None)


def is_per_element(parameter_name: str, name: str, value: Any, parameter: Tensor) -> bool:
    """Whether a state entry has one number per element, rather than one per parameter.

    Raises:
        ValueError: neither.
    """
    if not isinstance(value, Tensor) or name in NUMBERS:
        return False
    if value.shape == parameter.shape:
        return True
    if value.dim() == 0:
        return False
    raise ValueError(
        f"state {name!r} of {parameter_name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}: "
        "only state of the parameter's shape, or one number, can be sharded"
    )


def indices(optimizer: "Shards") -> dict[int, int]:
    """id(parameter) → its number in a state_dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {id(parameter): index for index, parameter in enumerate(parameters)}
