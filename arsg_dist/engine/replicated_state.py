"""Save and load a model and optimizer that a rank holds whole."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import (
    BUFFER,
    PARAMETER,
    EngineState,
    Group,
    key_of,
    plain_settings,
    restore_settings,
    state_numbers,
    state_tensors,
)
from arsg_dist.optim.kernels.split_master import CORRECTION, split
from arsg_dist.optim.state import local, new_correction


def parameter_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """Map all parameters of model and optimizer to their names.

    Raises:
        ValueError: the optimizer has a parameter that the model has not.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    if any(parameter not in names for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "the optimizer has parameters that are not the model's: they have no name to save them by"
        )
    return names


def persistent_buffers(module: nn.Module, *, duplicates: bool = True) -> dict[str, Tensor]:
    """Find the buffers of a module's `state_dict`, by all names or the first."""
    kept = module.state_dict(keep_vars=True)
    named = module.named_buffers(remove_duplicate=not duplicates)
    return {name: buffer for name, buffer in named if name in kept}


def add_buffers(state: EngineState, module: nn.Module, rank: int) -> None:
    """Add rank 0's persistent buffers: batch norm's differ between ranks."""
    if rank == 0:
        for name, buffer in persistent_buffers(module).items():
            state.add_whole(key_of(BUFFER, name), buffer)


def aliases_of(module: nn.Module, names: Mapping[Tensor, str]) -> dict[str, str]:
    """Map further names of parameters to the name they are saved under."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: names[parameter] for name, parameter in named if names.get(parameter, name) != name}


def named_groups(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> list[Group]:
    """List the optimizer's groups by the names of their parameters."""
    return [
        Group(plain_settings(group), [names[parameter] for parameter in group["params"]])
        for group in optimizer.param_groups
    ]


def replicated_state(
    engine: str, module: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world_size: int
) -> EngineState:
    """Make this rank's share of what every rank holds.

    Args:
        engine: name of the kind of engine.
        module: the model.
        optimizer: over (some of) its parameters.
        rank: of this process.
        world_size: ranks that share the writing.

    Raises:
        ValueError: state of a kind that is not saved.
    """
    names = parameter_names(module, optimizer)
    state = EngineState(engine, groups=named_groups(optimizer, names), aliases=aliases_of(module, names))
    tensors: dict[str, Tensor] = {key_of(PARAMETER, name): parameter for parameter, name in names.items()}
    corrections: dict[str, Tensor] = {}
    for parameter, held in optimizer.state.items():
        name = names[parameter]
        if CORRECTION in held:
            corrections[key_of(PARAMETER, name)] = held[CORRECTION]
        tensors |= {key_of(entry, name): value for entry, value in state_tensors(held)}
        if numbers := state_numbers(name, held):
            state.numbers[name] = numbers
    state.add_replicated(tensors, rank, world_size, corrections)
    add_buffers(state, module, rank)
    return state


def check_model(module: nn.Module, saved: SavedState) -> None:
    """Raise ValueError unless a saved run has just the model's parameters, buffers."""
    parameters, buffers = dict(module.named_parameters()), persistent_buffers(module)
    for entry, wanted, present in (
        (PARAMETER, parameters, saved.parameters),
        (BUFFER, buffers, saved.buffers),
    ):
        for name, tensor in wanted.items():
            saved.check_shape(entry, name, tensor.shape)
        if unknown := sorted(set(present) - wanted.keys()):
            raise ValueError(f"{saved.where} has a {entry} {unknown[0]!r}, which the model has not")


def optimizer_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    saved: SavedState,
    read: Callable[[str, str], Tensor] | None = None,
) -> dict[str, Any]:
    """Read a state as `Optimizer.load_state_dict` takes it, on the CPU.

    Settings of how the optimizer computes (foreach, fused, ...) are the optimizer's own.

    Args:
        optimizer: that will load it.
        names: of its parameters.
        saved: where from.
        read: gives a tensor of the state by entry and name of the parameter; default: whole.

    Raises:
        ValueError: it does not fit, or a file is damaged.
    """

    def value(entry: str, name: str) -> Any:
        if saved.spec(entry, name) is None:
            return saved.number(name, entry)
        return read(entry, name) if read else saved.whole(entry, name).clone()

    packed, count = optimizer.state_dict()["param_groups"], len(optimizer.param_groups)
    state: dict[int, dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        members = [names[parameter] for parameter in group["params"]]
        settings = _as_in(group, saved.settings_for(members, index, count))
        packed[index] = {**packed[index], **settings}
        for number, name in zip(packed[index]["params"], members, strict=True):
            entries = {entry: value(entry, name) for entry in sorted(saved.entries(name))}
            if entries:
                state[number] = entries
    return {"state": state, "param_groups": packed}


def _as_in(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    scratch = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
    restore_settings(scratch, saved)
    return {key: value for key, value in scratch.items() if key not in ("params", "param_names")}


@torch.no_grad()
def load_tensors(tensors: Iterable[tuple[str, str, Tensor]], saved: SavedState) -> None:
    """Fill whole tensors in place.

    Args:
        tensors: entry, name and the tensor to fill.
        saved: where from.
    """
    for entry, name, tensor in tensors:
        tensor.copy_(saved.whole(entry, name))


@torch.no_grad()
def split_masters(optimizer: torch.optim.Optimizer, master_of: Callable[[Tensor], Tensor]) -> None:
    """Give parameters that are halves of split masters, and their corrections, the values of loaded masters.

    Args:
        optimizer: with its state and parameters loaded.
        master_of: gives this rank's part of a parameter as it was saved.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("master") == "split" else ():
            state = optimizer.state.get(parameter)
            if not state:
                continue
            own, master = local(parameter), master_of(parameter)
            if CORRECTION not in state:
                state[CORRECTION] = new_correction(parameter)
            split(own, local(state[CORRECTION]), master.to(own.device, torch.float32).view(own.shape))


def load_replicated(module: nn.Module, optimizer: torch.optim.Optimizer, saved: SavedState) -> None:
    """Fill model and optimizer; no other rank takes part.

    Raises:
        ValueError: the saved run does not fit, found before anything changes; or a file is damaged, found on the way.
    """
    names = parameter_names(module, optimizer)
    check_model(module, saved)
    loaded = optimizer_state(optimizer, names, saved)
    load_tensors(((PARAMETER, name, parameter) for parameter, name in names.items()), saved)
    load_tensors(((BUFFER, name, buffer) for name, buffer in persistent_buffers(module).items()), saved)
    optimizer.load_state_dict(loaded)
    split_masters(optimizer, lambda parameter: saved.whole(PARAMETER, names[parameter]))
