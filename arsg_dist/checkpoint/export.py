"""Export a saved run's model to one safetensors file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from arsg_dist.checkpoint.safetensors_file import write_safetensors
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import BUFFER, PARAMETER, TensorSpec
from arsg_dist.optim.base_iterate import base_iterate_point, has_base_iterate

Point = Literal["x", "theta"]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def export_saved(saved: SavedState, path: Path, at: Point = "x", dtype: torch.dtype = torch.float32) -> None:
    """Write a saved run's parameters and buffers, one tensor at a time.

    The keys are those of the module's `state_dict`; tied parameters are written under each of their names. The file
    appears complete or not at all.

    Args:
        saved: the run.
        path: of the file; an existing one is replaced. Its directory must exist.
        at: "x", where the parameters are, or "theta", the base iterate.
        dtype: of parameters; buffers keep theirs.

    Raises:
        ValueError: an argument, a damaged file, or θ of an optimizer that has none.
        OSError: the file cannot be written.
    """
    check_arguments(at, dtype)
    of = {name: name for name in saved.parameters} | saved.aliases
    layout: Layout = {name: (dtype, _spec(saved, PARAMETER, of[name]).shape) for name in of}
    for name in saved.buffers:
        spec = _spec(saved, BUFFER, name)
        layout[name] = spec.dtype, spec.shape
    if at == "theta":
        _check_has_theta(saved)
    tensors = (tensor.to(layout[name][0]) for name, tensor in weights_of(saved, at))
    write_safetensors(path, layout, tensors, metadata_of(at))


def weights_of(saved: SavedState, at: Point = "x") -> Iterator[tuple[str, Tensor]]:
    """Yield a saved run's parameters and buffers, by their names in the module's `state_dict`.

    Args:
        saved: the run.
        at: as for `export_saved`.

    Raises:
        ValueError: a damaged file, or θ of another optimizer than ARSG.
    """
    if at == "theta":
        _check_has_theta(saved)
    for name, source in ({name: name for name in saved.parameters} | saved.aliases).items():
        yield name, _theta(saved, source) if at == "theta" else saved.whole(PARAMETER, source)
    for name in saved.buffers:
        yield name, saved.whole(BUFFER, name)


def check_arguments(at: str, dtype: torch.dtype) -> None:
    """Raise ValueError for another point or a dtype that is not floating."""
    if at not in ("x", "theta"):
        raise ValueError(f"at={at!r}: choose 'x' or 'theta'")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not floating-point")


def metadata_of(at: Point) -> dict[str, str]:
    """Make what the file says about itself."""
    return {"format": "pt", "arsg_point": at}


def _check_has_theta(saved: SavedState) -> None:
    if saved.group_of is None:
        raise ValueError(f"{saved.where} does not tell the settings of each parameter: export at='x'")
    if not all(map(has_base_iterate, saved.groups)):
        raise ValueError(
            f"{saved.where} was trained neither by ARSG nor by RemoteObservation, which alone have a base iterate: "
            "export at='x'"
        )


def _theta(saved: SavedState, name: str) -> Tensor:
    x, entries = saved.whole(PARAMETER, name), saved.entries(name)
    if not entries:
        return x
    assert saved.group_of is not None
    state = {
        entry: saved.number(name, entry) if saved.spec(entry, name) is None else saved.whole(entry, name)
        for entry in entries
    }
    settings = saved.groups[saved.group_of[name]]
    return base_iterate_point(x, state, {"capturable": False, **settings})  # how to compute is not saved


def _spec(saved: SavedState, entry: str, name: str) -> TensorSpec:
    spec = saved.spec(entry, name)
    assert spec is not None, name
    return spec
