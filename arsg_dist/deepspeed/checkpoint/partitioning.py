"""Map parameters to elements of flat tensors, in DeepSpeed's two ways.

The same rules describe a running engine and the files it wrote.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Locate a run of elements of one parameter inside a rank's flat tensor.

    Attributes:
        name: of the parameter.
        start: first element, counted in the flattened parameter.
        offset: where that element is in the flat tensor.
        numel: how many elements, at least 1.
    """

    name: str
    start: int
    offset: int
    numel: int


def pieces_of_range(
    parameters: Iterable[tuple[str, int, int]], rank: int, partition_size: int
) -> list[Piece]:
    """Cut a rank's range out of a group, as stages 1 and 2 do.

    The parameters of a group lie one after another, and each rank has an equal range of them.

    Args:
        parameters: name, number of elements, and first element in the flat group.
        rank: whose range.
        partition_size: elements per rank, padding included.
    """
    begin, end = rank * partition_size, (rank + 1) * partition_size
    pieces = []
    for name, numel, first in parameters:
        low, high = max(first, begin), min(first + numel, end)
        if low < high:
            pieces.append(Piece(name, low - first, low - begin, high - low))
    return pieces


def pieces_of_each(parameters: Iterable[tuple[str, int]], rank: int, world_size: int) -> list[Piece]:
    """Cut a rank's range out of every parameter, as stage 3 does.

    Each rank has an equal range of every parameter, and these lie one after another.

    Args:
        parameters: name and number of elements.
        rank: whose ranges.
        world_size: ranks that share a parameter.
    """
    pieces, offset = [], 0
    for name, numel in parameters:
        share = -(-numel // world_size)
        start = rank * share
        if start < numel:
            pieces.append(Piece(name, start, offset, min(share, numel - start)))
        offset += share
    return pieces


def offsets_in_group(numels: Iterable[int], paddings: Iterable[int]) -> Iterator[int]:
    """Yield the first element of each parameter in a flat group with paddings between."""
    offset = 0
    for numel, padding in zip(numels, paddings, strict=True):
        yield offset
        offset += numel + padding


def read_piece(tensor: Tensor, piece: Piece) -> Tensor:
    """Return a piece's elements, 1-dim; a view where the tensor's layout allows one."""
    return tensor.reshape(-1).narrow(0, piece.offset, piece.numel)


@torch.no_grad()
def write_piece(tensor: Tensor, piece: Piece, values: Tensor) -> None:
    """Copy a piece's elements, 1-dim, into the tensor that holds it, of any layout."""
    if piece.numel == tensor.numel():
        tensor.copy_(values.view(tensor.shape))
    else:
        tensor.view(-1).narrow(0, piece.offset, piece.numel).copy_(values)
