"""Divide the update among ranks that hold the whole network: each steps an equal part of its elements (ZeRO-1)."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arsg_dist.engine.replicated_state import (
    add_buffers,
    aliases_of,
    check_model,
    load_tensors,
    optimizer_state,
    persistent_buffers,
    split_masters,
)
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import (
    BUFFER,
    PARAMETER,
    EngineState,
    Group,
    TensorSpec,
    in_order,
    key_of,
    order_of,
    plain_settings,
    restore_settings,
    state_numbers,
    state_tensors,
)
from arsg_dist.optim.kernels.split_master import CORRECTION
from arsg_dist.optim.state import set_places


@dataclass(frozen=True)
class Piece:
    """Hold this rank's part of a parameter.

    Attributes:
        parameter: whole, on every rank.
        start: of its first element, in the order of the parameter's memory.
        part: the elements, in the parameter's own memory; what the optimizer has.
        at: of its first element, in this rank's part of the bucket.
    """

    parameter: nn.Parameter
    start: int
    part: nn.Parameter
    at: int

    @property
    def order(self) -> tuple[int, ...]:
        """Return the order of elements in the parameter's memory."""
        return order_of(self.parameter.stride(), self.parameter.shape)


@dataclass(frozen=True)
class Bucket:
    """Hold parameters whose gradients travel together, one after another in one memory.

    Attributes:
        starts: parameter → place of its first element.
        whole: the memory, padded to as many equal parts as there are ranks.
        part: this rank's part of it.
        pieces: of this rank.
    """

    starts: dict[nn.Parameter, int]
    whole: Tensor
    part: Tensor
    pieces: list[Piece]


class Shards:
    """Lay parameters out in buckets, of each of which each rank has an equal part to update.

    The optimizer is made over `groups`, the engine over the optimizer and these shards::

        shards = Shards(model.parameters())
        engine = DDPEngine(model, ARSG(shards.groups), communicator, shards=shards)

    Collective: rank 0's order of parameters must be that of all.

    Args:
        parameters: of the model, or groups of them as an optimizer takes them; on the device of the training, and not
            to be moved or cast afterwards.
        order: `model.parameters()`, where groups have them in another order: neighbours in it travel together.
        bucket_cap_mb: MiB of parameters of one dtype whose gradients travel together, as of `DistributedDataParallel`.

    Raises:
        ValueError: a parameter is twice in it, or has a layout with gaps.

    Attributes:
        groups: the same groups, with this rank's part of each parameter; a group of which it has none is empty.
        buckets: those of the parameters that come last first: a backward pass begins there.
        members: whole parameters of each group.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        order: Iterable[nn.Parameter] = (),
        bucket_cap_mb: float = 25.0,
    ) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        given: list[Any] = list(parameters)
        whole = (
            [dict(group) for group in given] if given and isinstance(given[0], dict) else [{"params": given}]
        )
        for group in whole:
            group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else [*group["params"]]
        self.members: list[list[nn.Parameter]] = [group["params"] for group in whole]
        listed = [parameter for members in self.members for parameter in members]
        if len({*listed}) != len(listed):
            raise ValueError("a parameter is in two groups, or twice in one")
        place = {parameter: index for index, parameter in enumerate(order)}
        listed.sort(key=lambda parameter: place.get(parameter, 0))
        self.buckets = [
            _bucket(members, rank, world_size) for members in _divide(listed, bucket_cap_mb * 2**20)
        ]
        own = {piece.parameter: piece.part for piece in self.pieces()}
        self.groups = [
            {**group, "params": [own[parameter] for parameter in group["params"] if parameter in own]}
            for group in whole
        ]

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's."""
        for bucket in self.buckets:
            yield from bucket.pieces

    @torch.no_grad()
    def gather(self) -> None:
        """Bring every rank's parts to all of them. Collective."""
        under_way: list[Any] = []
        for bucket in self.buckets:
            if bucket.whole.device.type != "cpu":
                under_way.append(dist.all_gather_into_tensor(bucket.whole, bucket.part, async_op=True))
                continue
            # Gloo's all-gather makes the whole again in new memory, which costs more than its messages.
            for source, sent in enumerate(torch.split(bucket.whole, max(bucket.part.numel(), 1))):
                under_way.append(dist.broadcast(sent, source, async_op=True))
        for work in under_way:
            work.wait()


def _divide(parameters: list[nn.Parameter], limit: float) -> list[list[nn.Parameter]]:
    """Put neighbours of one dtype together, the last first, up to a number of bytes."""
    open_of: dict[torch.dtype, list[nn.Parameter]] = {}
    divided: list[list[nn.Parameter]] = []
    for parameter in reversed(parameters):
        members = open_of.get(parameter.dtype)
        if members is None or sum(member.nbytes for member in (*members, parameter)) > limit:
            members = open_of[parameter.dtype] = []
            divided.append(members)
        members.append(parameter)
    return divided


def _bucket(parameters: list[nn.Parameter], rank: int, world_size: int) -> Bucket:
    size = -(-sum(parameter.numel() for parameter in parameters) // world_size)
    whole = torch.zeros(size * world_size, dtype=parameters[0].dtype, device=parameters[0].device)
    made = Bucket({}, whole, whole.narrow(0, rank * size, size), [])
    at = 0
    for parameter in parameters:
        _move(parameter, whole.narrow(0, at, parameter.numel()))
        made.starts[parameter] = at
        first, last = max(at, rank * size), min(at + parameter.numel(), (rank + 1) * size)
        if first < last:
            part = nn.Parameter(whole.narrow(0, first, last - first))
            set_places(part, [(0, last - first, first - at)])
            made.pieces.append(Piece(parameter, first - at, part, first - rank * size))
        at += parameter.numel()
    return made


@torch.no_grad()
def _move(parameter: nn.Parameter, memory: Tensor) -> None:
    """Put a parameter into this memory, in the order it lies in."""
    order = order_of(parameter.stride(), parameter.shape)
    memory.copy_(in_order(parameter, order))
    if not parameter.numel():
        return
    moved = memory.as_strided(parameter.shape, parameter.stride(), memory.storage_offset())
    if not torch.equal(moved, parameter):
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has strides {parameter.stride()}, with gaps or overlaps: "
            "make it contiguous"
        )
    parameter.data = moved


def sharded_state(
    kind: str, module: nn.Module, optimizer: torch.optim.Optimizer, shards: Shards, rank: int, world_size: int
) -> EngineState:
    """Make this rank's part of a model whose update is divided.

    Raises:
        ValueError: state of a kind that is not saved.
    """
    names: Mapping[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    groups = [
        Group(plain_settings(group), [names[parameter] for parameter in members])
        for group, members in zip(optimizer.param_groups, shards.members, strict=True)
    ]
    state = EngineState(kind, groups=groups, aliases=aliases_of(module, names))
    for piece in shards.pieces():
        name, held = names[piece.parameter], optimizer.state.get(piece.part, {})
        if numbers := state_numbers(name, held):
            state.numbers[name] = numbers
        for entry, tensor in {PARAMETER: piece.part, **dict(state_tensors(held))}.items():
            if tensor.shape != piece.part.shape:
                raise ValueError(
                    f"the optimizer keeps {entry!r} of {name!r} in another shape: it is not saved"
                )
            correction = held.get(CORRECTION) if entry == PARAMETER else None
            dtype = tensor.dtype if correction is None else torch.float32
            spec = TensorSpec(dtype, tuple(piece.parameter.shape), piece.order)
            state.add(key_of(entry, name), spec, piece.start, tensor.numel(), tensor, 0, correction)
    replicated = {key_of(PARAMETER, name): parameter for name, parameter in untrained(module, shards)}
    state.add_replicated(replicated, rank, world_size)
    add_buffers(state, module, rank)
    return state


@torch.no_grad()
def load_sharded(
    module: nn.Module, optimizer: torch.optim.Optimizer, shards: Shards, saved: SavedState
) -> None:
    """Fill this rank's parts, and what every rank holds; `Shards.gather` is to follow.

    Raises:
        ValueError: the saved run does not fit, found before anything changes; or a file is damaged, found on the way.
    """
    names: Mapping[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    check_model(module, saved)
    piece_of = {names[piece.parameter]: piece for piece in shards.pieces()}

    def part(entry: str, name: str) -> Tensor:
        piece, spec = piece_of[name], saved.spec(entry, name)
        if spec is None or spec.shape != tuple(piece.parameter.shape):
            raise ValueError(
                f"{saved.where} has {entry!r} of {name!r} in another shape: it cannot be divided"
            )
        return saved.read(entry, name, piece.start, piece.part.numel(), piece.order).clone()

    own: dict[Tensor, str] = {piece.part: names[piece.parameter] for piece in shards.pieces()}
    loaded = optimizer_state(optimizer, own, saved, part)
    count = len(optimizer.param_groups)
    for index, (packed, members) in enumerate(zip(loaded["param_groups"], shards.members, strict=True)):
        # Of all members, also where this rank has no part of any.
        restore_settings(
            packed, saved.settings_for([names[parameter] for parameter in members], index, count)
        )
    for name, piece in piece_of.items():
        piece.part.copy_(part(PARAMETER, name))
    load_tensors(((PARAMETER, name, parameter) for name, parameter in untrained(module, shards)), saved)
    load_tensors(((BUFFER, name, buffer) for name, buffer in persistent_buffers(module).items()), saved)
    optimizer.load_state_dict(loaded)
    split_masters(optimizer, lambda own_part: part(PARAMETER, own[own_part]))


def untrained(module: nn.Module, shards: Shards) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of what no group has; every rank holds it whole."""
    trained = {parameter for members in shards.members for parameter in members}
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter not in trained)
