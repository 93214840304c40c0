"""Define a run's engine-independent state: named tensors in rank-local pieces.

A run is a set of named tensors: each parameter's value, each entry of its optimizer state, buffers. Ranks offer
*pieces* of them, consecutive elements in a stated order, and ask for other pieces when they load. Settings of groups
go by the names of the parameters, and numbers (step counts) by parameter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.optim.kernels.split_master import CORRECTION, joined

PARAMETER: Final = "parameter"
"""The entry of a parameter's value, in the highest precision the engine has: its fp32 master, if there is one."""

BUFFER: Final = "buffer"

EXTRA: Final = "extra"
"""The entry of tensors that a program adds to what the engine offers."""

# How an engine computes, rather than what: each keeps its own.
_IMPLEMENTATION: Final = frozenset(
    {"params", "param_names", "foreach", "fused", "capturable", "differentiable", "master"}
)

_PIECE_NUMEL: Final = 1 << 24  # a loader that wants a part reads and checks whole pieces


def key_of(entry: str, name: str) -> str:
    """Name a tensor of a run.

    Args:
        entry: `PARAMETER`, `BUFFER`, `EXTRA` or a key of the optimizer's state ("exp_avg").
        name: of the parameter or buffer, as in the model.
    """
    return f"{entry}:{name}"


@dataclass(frozen=True)
class TensorSpec:
    """Describe a whole tensor.

    Attributes:
        dtype: of the elements.
        shape: of the whole.
        order: dimensions from the slowest to the fastest in which pieces count elements; empty for row by row.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Count the elements."""
        return math.prod(self.shape)


def order_of(stride: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Find the order of elements in dense memory; empty if row by row.

    Args:
        stride: of the tensor, in elements.
        shape: of the tensor.
    """
    moving = [dim for dim in range(len(shape)) if shape[dim] > 1]
    by_stride = sorted(moving, key=lambda dim: -stride[dim])
    if by_stride == moving:
        return ()
    return tuple([dim for dim in range(len(shape)) if shape[dim] <= 1] + by_stride)


def in_order(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return elements in an order, 1-D; a view if the memory allows."""
    return (tensor.permute(order) if order else tensor).reshape(-1)


def from_order(flat: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """Return the tensor whose elements in an order are `flat`, sharing memory."""
    if not order:
        return flat.view(shape)
    inverse = [order.index(dim) for dim in range(len(shape))]
    return flat.view([shape[dim] for dim in order]).permute(inverse)


@dataclass(frozen=True)
class Piece:
    """Hold consecutive elements of a tensor of the run.

    Attributes:
        key: of the tensor.
        start: first element, counted in the order of its `TensorSpec`.
        numel: how many.
        source: a tensor that holds them, row by row from `offset`; may be the training's own.
        offset: of the first element in `source`.
        correction: of a split master, of which `source` is the bfloat16 parameter; laid out alike.
    """

    key: str
    start: int
    numel: int
    source: Tensor
    offset: int = 0
    correction: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Return the elements' dtype."""
        return self.source.dtype if self.correction is None else torch.float32

    def values(self) -> Tensor:
        """Return the elements, 1-D; a view if the memory of `source` allows."""
        values = self._part(self.source)
        return values if self.correction is None else joined(values, self._part(self.correction))

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1).narrow(0, self.offset, self.numel)


@dataclass
class Group:
    """Describe a parameter group.

    Attributes:
        settings: lr, betas, ...: numbers, strings, booleans, None and lists of them.
        parameters: names.
    """

    settings: dict[str, Any]
    parameters: list[str]


@dataclass
class EngineState:
    """Hold what one rank saves; all ranks' pieces cover every element once.

    Attributes:
        engine: name of the kind of engine.
        tensors: key → what it is; at least those this rank has pieces of.
        pieces: of this rank.
        groups: the same on every rank.
        numbers: parameter → entry → number (steps); of the parameters that this rank knows it of.
        aliases: further names of parameters → the name they are saved under.
        loss_scale: of dynamic loss scaling: "kind", "scale" and what else the kind keeps; or None.
        counters: of the engine, for one of the same kind.
    """

    engine: str
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    loss_scale: dict[str, Any] | None = None
    counters: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        key: str,
        spec: TensorSpec,
        start: int,
        numel: int,
        source: Tensor,
        offset: int,
        correction: Tensor | None = None,
    ) -> None:
        """Add a piece, in parts if it is large."""
        self.tensors[key] = spec
        for first in range(0, numel, _PIECE_NUMEL):
            count = min(_PIECE_NUMEL, numel - first)
            self.pieces.append(Piece(key, start + first, count, source, offset + first, correction))

    def add_whole(self, key: str, tensor: Tensor) -> None:
        """Add a tensor that this rank alone holds, or alone writes."""
        self.add(key, TensorSpec(tensor.dtype, tuple(tensor.shape)), 0, tensor.numel(), tensor, 0)

    def add_replicated(
        self,
        tensors: Mapping[str, Tensor],
        rank: int,
        world_size: int,
        corrections: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add this rank's share of tensors that every rank holds alike.

        Args:
            tensors: key → whole tensor; the same on every rank.
            rank: of this process.
            world_size: ranks that share the writing.
            corrections: key → correction of a split master.
        """
        whole = {
            key: Piece(key, 0, t.numel(), t, 0, (corrections or {}).get(key)) for key, t in tensors.items()
        }
        sizes = {key: piece.dtype.itemsize for key, piece in whole.items()}
        total = sum(sizes[key] * piece.numel for key, piece in whole.items())
        begin, end = total * rank // world_size, total * (rank + 1) // world_size
        at = 0
        for key, tensor in tensors.items():
            self.tensors[key] = TensorSpec(whole[key].dtype, tuple(tensor.shape))
            size = sizes[key]
            # Rounded down on both sides, so that neighbours agree on the element in between.
            first = min(max((begin - at) // size, 0), tensor.numel())
            last = min(max((end - at) // size, 0), tensor.numel())
            if last > first:
                self.add(key, self.tensors[key], first, last - first, tensor, first, whole[key].correction)
            at += size * tensor.numel()


def plain_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group's settings as JSON knows them.

    Raises:
        ValueError: a setting of another kind.
    """
    return {key: _plain(key, value) for key, value in travelling(group).items()}


def travelling(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a group that go from one engine to another."""
    return {key: value for key, value in group.items() if key not in _IMPLEMENTATION}


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(key, item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise ValueError(
        f"the setting {key!r} of a parameter group is a {type(value).__name__}, which is not saved"
    )


@torch.no_grad()
def restore_settings(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Give a parameter group saved settings, in the kinds it has them: tensors stay tensors, on their device.

    Args:
        group: of an optimizer.
        saved: settings, perhaps of somebody else's run.

    Raises:
        ValueError: a setting of another kind than the optimizer's, as a text for lr.
    """
    for key, value in travelling(saved).items():
        present = group.get(key)
        if None not in (kinds := {_kind(value), _kind(present)}) and len(kinds) > 1:
            raise ValueError(
                f"the saved setting {key!r} of a parameter group is {value!r}, the optimizer's {present!r}"
            )
        if isinstance(present, Tensor):
            present.fill_(value)
        elif isinstance(value, list):
            group[key] = tuple(value)
        else:
            group[key] = value.item() if isinstance(value, Tensor) else value


def _kind(value: Any) -> str | None:
    """What a setting is; None for what says nothing, or is none of ours."""
    if isinstance(value, Tensor | int | float) and not isinstance(value, bool):
        return "number"
    kinds = {bool: "bool", str: "text", list: "list", tuple: "list"}
    return next((kind for type_, kind in kinds.items() if isinstance(value, type_)), None)


def state_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """List the entries of a state that are tensors with dimensions, and saved by themselves."""
    return (
        (entry, value)
        for entry, value in state.items()
        if isinstance(value, Tensor) and value.dim() and entry != CORRECTION
    )


def state_numbers(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the others: numbers, None, and tensors without dimensions.

    Raises:
        ValueError: an entry of another kind.
    """
    numbers = {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for key, value in state.items()
        if not (isinstance(value, Tensor) and value.dim()) and key != CORRECTION
    }
    for key, value in numbers.items():
        if not (value is None or isinstance(value, bool | int | float | Tensor)):
            raise ValueError(
                f"the optimizer keeps {key!r} of {name!r} as a {type(value).__name__}, which is not saved"
            )
    return numbers
