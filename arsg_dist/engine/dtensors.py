"""Save, load and compare tensors of which each rank holds a part: torch's `DTensor`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import EngineState, TensorSpec


def is_divided(tensor: Tensor) -> bool:
    """Tell whether a tensor is a `DTensor`."""
    return hasattr(tensor, "to_local")


def place_of(tensor: Any) -> tuple[int, int]:
    """Find where a rank's shard begins and how many elements it has, row by row.

    Raises:
        ValueError: it is not sharded along its first dimension alone.
    """
    from torch.distributed.tensor import Shard  # not for those who have no such tensors: it takes a while

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


def shard_index(tensor: Any) -> int:
    """Number the shard that this rank holds; ranks with the same number hold the same."""
    index = 0
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            index = index * tensor.device_mesh.size(dim) + tensor.device_mesh.get_local_rank(dim)
    return index


def add_divided(state: EngineState, key: str, tensor: Any, correction: Tensor | None = None) -> None:
    """Add this rank's shard of a tensor, where it is the first of those that hold the same.

    Args:
        state: of this rank.
        key: of the tensor.
        tensor: sharded along its first dimension.
        correction: this rank's lower halves of a split master, of which the tensor is the upper ones.
    """
    spec = TensorSpec(tensor.dtype if correction is None else torch.float32, tuple(tensor.shape))
    state.tensors[key] = spec
    start, numel = place_of(tensor)
    if all(
        not placement.is_replicate() or tensor.device_mesh.get_local_rank(dim) == 0
        for dim, placement in enumerate(tensor.placements)
    ):
        state.add(key, spec, start, numel, tensor.to_local(), 0, correction)


def add_tensors(state: EngineState, tensors: Mapping[str, Tensor], rank: int, world_size: int) -> None:
    """Add this rank's share of tensors that every rank holds alike, or its shard.

    Args:
        state: of this rank.
        tensors: key → tensor; the same on every rank.
        rank: of this process.
        world_size: ranks that share the writing.
    """
    state.add_replicated(
        {key: tensor for key, tensor in tensors.items() if not is_divided(tensor)}, rank, world_size
    )
    for key, tensor in tensors.items():
        if is_divided(tensor):
            add_divided(state, key, tensor)


@torch.no_grad()
def read_like(saved: SavedState, entry: str, name: str, like: Any) -> Tensor:
    """Read what this rank holds of a tensor.

    Args:
        saved: where from.
        entry: see `key_of`.
        name: see `key_of`.
        like: a tensor of that shape, on this rank whole or a shard.

    Returns:
        The whole on the CPU, or a shard of the saved dtype beside `like`.

    Raises:
        ValueError: it has another shape, or a file is damaged.
    """
    if not is_divided(like):
        return saved.whole(entry, name)
    spec = saved.spec(entry, name)
    if spec is None or spec.shape != tuple(like.shape):
        raise ValueError(
            f"{saved.where} has {entry!r} of {name!r} in shape {spec and spec.shape}: it cannot be sharded"
        )
    filled: Any = torch.zeros_like(like, dtype=spec.dtype)
    fill(filled, saved, entry, name)
    result: Tensor = filled
    return result


@torch.no_grad()
def fill(tensor: Any, saved: SavedState, entry: str, name: str) -> None:
    """Fill this rank's shard in place."""
    held = tensor.to_local()
    held.copy_(saved.read(entry, name, *place_of(tensor)).view(held.shape))
