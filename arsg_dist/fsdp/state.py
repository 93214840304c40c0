"""Save and load shards of parameters and state; a rank holds only its own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from arsg_dist.engine.dtensors import add_divided, fill, place_of, read_like
from arsg_dist.engine.replicated_state import (
    add_buffers,
    aliases_of,
    check_model,
    load_tensors,
    named_groups,
    optimizer_state,
    parameter_names,
    persistent_buffers,
    split_masters,
)
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import BUFFER, PARAMETER, EngineState, key_of, state_numbers, state_tensors
from arsg_dist.optim.kernels.split_master import CORRECTION
from arsg_dist.optim.state import local

__all__ = ["load_sharded", "place_of", "sharded_state"]


def sharded_state(kind: str, module: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> EngineState:
    """Make this rank's part of a sharded model and its optimizer.

    Args:
        kind: name of the engine.
        module: the model, after `shard`.
        optimizer: over (some of) its parameters.
        rank: of this process; 0 writes the buffers.

    Raises:
        ValueError: state of a kind that is not saved.
    """
    names = parameter_names(module, optimizer)
    state = EngineState(kind, groups=named_groups(optimizer, names), aliases=aliases_of(module, names))
    for parameter, name in names.items():
        held = optimizer.state.get(parameter, {})
        if numbers := state_numbers(name, held):
            state.numbers[name] = numbers
        for entry, tensor in {PARAMETER: parameter, **dict(state_tensors(held))}.items():
            if not isinstance(tensor, DTensor) or tensor.shape != parameter.shape:
                raise ValueError(
                    f"the optimizer keeps {entry!r} of {name!r} in another shape: it is not saved"
                )
            correction = local(held[CORRECTION]) if entry == PARAMETER and CORRECTION in held else None
            add_divided(state, key_of(entry, name), tensor, correction)
    add_buffers(state, module, rank)
    return state


def load_sharded(module: nn.Module, optimizer: torch.optim.Optimizer, saved: SavedState) -> None:
    """Fill this rank's shards, and what every rank holds; no other rank takes part.

    Raises:
        ValueError: the saved run does not fit, found before anything changes; or a file is damaged, found on the way.
    """
    names = parameter_names(module, optimizer)
    parameter_of: dict[str, Any] = {name: parameter for parameter, name in names.items()}
    check_model(module, saved)
    loaded = optimizer_state(
        optimizer, names, saved, lambda entry, name: read_like(saved, entry, name, parameter_of[name])
    )
    for name, parameter in parameter_of.items():
        fill(parameter, saved, PARAMETER, name)
    load_tensors(((BUFFER, name, buffer) for name, buffer in persistent_buffers(module).items()), saved)
    optimizer.load_state_dict(loaded)

    def master_of(parameter: Any) -> Tensor:
        return saved.read(PARAMETER, names[parameter], *place_of(parameter))

    split_masters(optimizer, master_of)
