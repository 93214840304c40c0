"""Convert saved runs to portable checkpoints, and these for plain torch."""

import os
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.checkpoint.writer import write_manifest, write_part
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import (
    BUFFER,
    PARAMETER,
    EngineState,
    Group,
    key_of,
    plain_settings,
    state_numbers,
)
from arsg_dist.safe_io.files import new_directory, writing

TRUST_HELP: Final = (
    "execute what the pickles of DeepSpeed's checkpoint name besides tensors and plain values, as the objects of your "
    "own classes in the client state of save_checkpoint: only for files whose writer you trust as you trust a program "
    "of theirs"
)
"""Help of --trust-pickle, of each command that opens DeepSpeed's own checkpoints."""


def to_portable(saved: SavedState, target: Path, engine: str, progress: dict[str, Any]) -> None:
    """Write a portable checkpoint, as one process.

    Args:
        saved: any saved run that tells the group of each parameter.
        target: a directory that does not exist; it appears when it is complete.
        engine: name of the kind that saved the run.
        progress: of the program; anything JSON knows.

    Raises:
        ValueError: the target exists, or the run lacks something.
        OSError: it cannot be written.
    """
    check_new(target)
    members = members_of(saved)
    state = EngineState(
        engine, aliases=saved.aliases, loss_scale=saved.loss_scale, counters=dict(saved.counters)
    )
    if state.loss_scale is not None and "kind" not in state.loss_scale:
        scale = float(state.loss_scale["cur_scale"])
        state.loss_scale = {"kind": "DeepSpeed", "scale": scale, **state.loss_scale}
    state.groups = [
        Group(plain_settings(group), names) for group, names in zip(saved.groups, members, strict=True)
    ]
    for name in saved.parameters:
        state.add_whole(key_of(PARAMETER, name), saved.whole(PARAMETER, name))
        numbers = {}
        for entry in sorted(saved.entries(name)):
            if saved.spec(entry, name) is None:
                numbers[entry] = saved.number(name, entry)
            else:
                state.add_whole(key_of(entry, name), saved.whole(entry, name))
        if numbers:
            state.numbers[name] = state_numbers(name, numbers)
    for name in saved.buffers:
        state.add_whole(key_of(BUFFER, name), saved.whole(BUFFER, name))
    with new_directory(target) as partial:
        write_part(partial, 0, state)
        write_manifest(partial, 1, state, progress)


def to_torch(saved: SavedState, target: Path) -> None:
    """Write one file for ``torch.load(target, weights_only=True)``; the whole run is in memory.

    Its keys: "model", a state dict with tied parameters under each name; "optimizer", a state dict whose parameters are
    numbered in the order of the groups; "parameters", their names in this order; "progress".

    Args:
        saved: the run.
        target: of the file, which must not exist.

    Raises:
        ValueError: the target exists, or a file of the run is damaged.
        OSError: it cannot be written.
    """
    check_new(target)
    model = {name: saved.whole(PARAMETER, name) for name in saved.parameters}
    model |= {alias: model[name] for alias, name in saved.aliases.items()}
    model |= {name: saved.whole(BUFFER, name) for name in saved.buffers}
    members = members_of(saved)
    names = [name for group in members for name in group]
    number = {name: index for index, name in enumerate(names)}
    optimizer = {
        "state": {
            number[name]: {
                entry: saved.whole(entry, name)
                if saved.spec(entry, name)
                else number_or_tensor(saved, name, entry)
                for entry in sorted(saved.entries(name))
            }
            for name in names
            if saved.entries(name)
        },
        "param_groups": [
            {**_for_torch(settings), "params": [number[name] for name in group]}
            for settings, group in zip(saved.groups, members, strict=True)
        ],
    }
    content = {
        "model": model,
        "optimizer": optimizer,
        "parameters": names,
        "progress": getattr(saved, "progress", {}),
    }
    try:
        with writing(target) as file:
            torch.save(content, file)
    except RuntimeError as error:  # how torch's writer says that the disk is full
        raise OSError(f"cannot write {target}: {str(error).splitlines()[0]}") from error


def _for_torch(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def members_of(saved: SavedState) -> list[list[str]]:
    """List the names of each group's parameters.

    Raises:
        ValueError: the run does not tell.
    """
    if saved.group_of is None:
        raise ValueError(f"{saved.where} does not tell the settings of each parameter: convert the original")
    members: list[list[str]] = [[] for _ in saved.groups]
    for name, index in saved.group_of.items():
        members[index].append(name)
    return members


def number_or_tensor(saved: SavedState, name: str, entry: str) -> Any:
    """Return a number of a parameter as its optimizer keeps it: torch's count their steps in tensors, ARSG does not."""
    value = saved.number(name, entry)
    assert saved.group_of is not None
    if entry == "step" and not isinstance(value, Tensor) and "mu" not in saved.groups[saved.group_of[name]]:
        return torch.tensor(float(value))
    return value


def check_new(target: Path) -> None:
    """Raise ValueError unless something new can be made there."""
    if os.path.lexists(target):
        raise ValueError(f"{target} exists already: choose another name or remove it")
    if not target.parent.is_dir():
        raise ValueError(f"directory {target.parent} does not exist")
