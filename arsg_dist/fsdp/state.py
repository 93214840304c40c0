"""Save and load shards of parameters and state; a rank holds only its own."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

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
from arsg_dist.engine.state import (
    BUFFER,
    PARAMETER,
    EngineState,
    TensorSpec,
    key_of,
    state_numbers,
    state_tensors,
)
from arsg_dist.optim.kernels.split_master import CORRECTION
from arsg_dist.optim.state import local


def place_of(tensor: DTensor) -> tuple[int, int]:
    """Find where a rank's shard begins and how many elements it has, row by row.

    Raises:
        ValueError: it is not sharded along its first dimension alone.
    """
    begin, rows = 0, tensor.shape[0]
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if placement != Shard(0):
            raise ValueError(
                f"a tensor placed as {tensor.placements} cannot be saved: shard dimension 0 only"
            )
        chunk = math.ceil(rows / tensor.device_mesh.size(dim))
        first = min(chunk * tensor.device_mesh.get_local_rank(dim), rows)
        begin, rows = begin + first, min(chunk, rows - first)
    row = math.prod(tensor.shape[1:])
    assert tensor.to_local().numel() == rows * row
    return begin * row, rows * row


def _writes(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same shard."""
    return all(
        not placement.is_replicate() or tensor.device_mesh.get_local_rank(dim) == 0
        for dim, placement in enumerate(tensor.placements)
    )


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
        assert isinstance(parameter, DTensor)
        held = optimizer.state.get(parameter, {})
        if numbers := state_numbers(name, held):
            state.numbers[name] = numbers
        start, numel = place_of(parameter)
        for entry, tensor in {PARAMETER: parameter, **dict(state_tensors(held))}.items():
            if not isinstance(tensor, DTensor) or tensor.shape != parameter.shape:
                raise ValueError(
                    f"the optimizer keeps {entry!r} of {name!r} in another shape: it is not saved"
                )
            correction = local(held[CORRECTION]) if entry == PARAMETER and CORRECTION in held else None
            spec = TensorSpec(tensor.dtype if correction is None else torch.float32, tuple(tensor.shape))
            state.tensors[key_of(entry, name)] = spec
            if _writes(tensor):
                state.add(key_of(entry, name), spec, start, numel, tensor.to_local(), 0, correction)
    add_buffers(state, module, rank)
    return state


@torch.no_grad()
def load_sharded(module: nn.Module, optimizer: torch.optim.Optimizer, saved: SavedState) -> None:
    """Fill this rank's shards, and what every rank holds; no other rank takes part.

    Raises:
        ValueError: the saved run does not fit, found before anything changes; or a file is damaged, found on the way.
    """
    names = parameter_names(module, optimizer)
    parameter_of: dict[str, Any] = {name: parameter for parameter, name in names.items()}
    check_model(module, saved)

    def shard_of(entry: str, name: str) -> Tensor:
        parameter = parameter_of[name]
        spec = saved.spec(entry, name)
        assert spec is not None
        if spec.shape != tuple(parameter.shape):
            raise ValueError(
                f"{saved.where} has {entry!r} of {name!r} in shape {spec.shape}: it cannot be sharded"
            )
        filled: Any = torch.zeros_like(parameter, dtype=spec.dtype)
        _fill(filled, saved, entry, name)
        result: Tensor = filled
        return result

    loaded = optimizer_state(optimizer, names, saved, shard_of)
    for name, parameter in parameter_of.items():
        _fill(parameter, saved, PARAMETER, name)
    load_tensors(((BUFFER, name, buffer) for name, buffer in persistent_buffers(module).items()), saved)
    optimizer.load_state_dict(loaded)

    def master_of(parameter: Any) -> Tensor:
        return saved.read(PARAMETER, names[parameter], *place_of(parameter))

    split_masters(optimizer, master_of)


def _fill(tensor: DTensor, saved: SavedState, entry: str, name: str) -> None:
    local = tensor.to_local()
    local.copy_(saved.read(entry, name, *place_of(tensor)).view(local.shape))
