"""Loads a whole state into a sharded optimizer, of which every rank keeps its part."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arsg_dist.horovod.exchange import sum_dtype
from arsg_dist.horovod.partition import Partition
from arsg_dist.horovod.state_entries import HELD, MASTER, Entries, indices, is_per_element

if TYPE_CHECKING:
    from arsg_dist.horovod.shards import Shards


def load_state(optimizer: "Shards", state_dict: dict[str, Any] | None) -> None:
    """See `ShardedOptimizer.load_state_dict`. Collective."""
    world = optimizer._groups.world
    holds = state_dict is not None and not state_dict.get(HELD, False)
    with world.fail_together():
        if holds:
            assert state_dict is not None
            _check_fit(optimizer, state_dict)
    everywhere = world.all_gather_object(holds, "load.holds")
    if not everywhere[0]:
        raise ValueError(
            "load_state_dict: rank 0 was given no whole state (only rank 0 gets one from state_dict())"
        )
    outline = _outline(optimizer, state_dict) if holds else None
    outlines = world.all_gather_object(outline, "load.outline")
    if any(other is not None and repr(other) != repr(outlines[0]) for other in outlines):
        raise ValueError("load_state_dict: the ranks were given different states")
    assert outlines[0] is not None
    groups, entries = outlines[0]
    index = indices(optimizer)
    loaded: dict[Tensor, dict[str, Any]] = {}
    for number, partition in enumerate(optimizer._partitions):
        _load_partition(
            optimizer,
            partition,
            number,
            index,
            entries,
            state_dict if holds else None,
            all(everywhere),
            loaded,
        )
    sharded = {index[id(p)] for partition in optimizer._partitions for p in partition.parameters}
    kept = world.all_gather_object(
        {place: entry for place, entry in (state_dict or {}).get("state", {}).items() if place not in sharded}
        if world.rank == 0
        else None,
        "load.frozen",
    )[0]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer._whole_state = {
        parameters[place]: {
            # What has one number per element was on the parameter's device, and came by way of main memory.
            name: value.to(parameters[place].device) if isinstance(value, Tensor) and value.dim() else value
            for name, value in entry.items()
        }
        for place, entry in (kept or {}).items()
    }
    optimizer._inner.load(copy.deepcopy(groups), loaded)
    for partition in optimizer._partitions:
        partition.take_gradients_back()


def _check_fit(optimizer: "Shards", state_dict: dict[str, Any]) -> None:
    """Raises ValueError unless the state's groups and shapes are those of the parameters."""
    mine = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in state_dict["param_groups"]]
    if mine != theirs:
        raise ValueError(
            f"the state has groups of {theirs} parameters and the optimizer has groups of {mine}: it is not the state "
            "of this model and these groups"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, entry in state_dict["state"].items():
        for name, value in entry.items():
            is_per_element(f"parameter {place}", name, value, parameters[place])
    for place, master in state_dict.get(MASTER, {}).items():
        if master.shape != parameters[place].shape:
            raise ValueError(
                f"{MASTER} {place} has shape {tuple(master.shape)}, not {tuple(parameters[place].shape)}"
            )


def _outline(optimizer: "Shards", state_dict: dict[str, Any] | None) -> tuple[list[dict[str, Any]], Entries]:
    """The groups, and what state each parameter has: name → ("tensor", dtype) or ("number", value)."""
    assert state_dict is not None
    masters = state_dict.get(MASTER, {})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: Entries = {}
    for place in sorted({*state_dict["state"], *masters}):
        entries[place] = {
            name: (
                ("tensor", value.dtype)
                if is_per_element(str(place), name, value, parameters[place])
                else ("number", value)
            )
            for name, value in state_dict["state"].get(place, {}).items()
        }
        if place in masters:
            entries[place][MASTER] = ("tensor", torch.float32)
    return state_dict["param_groups"], entries


def _load_partition(
    optimizer: "Shards",
    partition: Partition,
    number: int,
    index: dict[int, int],
    entries: Entries,
    state_dict: dict[str, Any] | None,
    local: bool,
    loaded: dict[Tensor, dict[str, Any]],
) -> None:
    """Fills `loaded` (piece → state) and the masters with this rank's part."""
    layout = partition.layout
    place_of = [index[id(parameter)] for parameter in partition.parameters]
    kinds: Entries = {
        parameter: entries[place] for parameter, place in enumerate(place_of) if place in entries
    }
    for segment, piece in partition.pieces:
        if segment.parameter in kinds:
            loaded[piece] = {
                name: copy.deepcopy(value)  # pieces of one parameter count their steps separately
                for name, (kind, value) in kinds[segment.parameter].items()
                if kind == "number"
            }

    def whole(parameter: int, name: str) -> Tensor:
        assert state_dict is not None
        place = place_of[parameter]
        tensor: Tensor = state_dict[MASTER][place] if name == MASTER else state_dict["state"][place][name]
        return layout.parameters[parameter].flat(tensor)

    def put(piece: Tensor, name: str, part: Tensor) -> None:
        if name == MASTER:
            piece.copy_(part)
        else:
            loaded[piece][name] = part.clone().to(piece.device)

    named: dict[tuple[str, torch.dtype], list[int]] = {}
    for parameter, known in kinds.items():
        own_dtype = layout.parameters[parameter].dtype
        for name, (kind, dtype) in known.items():
            # Full-precision parameters are their own masters, and are loaded with the model.
            if kind == "tensor" and (name != MASTER or sum_dtype(own_dtype) != own_dtype):
                named.setdefault((name, dtype), []).append(parameter)
    for (name, dtype), parameters in sorted(named.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        wanted = set(parameters)
        if local:
            for segment, piece in partition.pieces:
                if segment.parameter in wanted:
                    put(
                        piece,
                        name,
                        whole(segment.parameter, name).narrow(0, segment.parameter_start, segment.numel),
                    )
            continue
        for bucket in layout.buckets:
            segments = [s for s in layout.segments if s.bucket == bucket.index and s.parameter in wanted]
            if not segments:
                continue
            flat = None
            if optimizer._groups.world.rank == 0:
                flat = torch.zeros(bucket.numel, dtype=dtype)
                for segment in segments:
                    part = whole(segment.parameter, name).narrow(0, segment.parameter_start, segment.numel)
                    flat.narrow(0, segment.start, segment.numel).copy_(part)
            shard = _scatter(optimizer, flat, bucket.shard_numel, dtype, f"load{number}.{name}")
            for segment, piece in partition.pieces:
                if segment.bucket == bucket.index and segment.parameter in wanted:
                    put(piece, name, shard.narrow(0, segment.start, segment.numel))


def _scatter(optimizer: "Shards", flat: Tensor | None, numel: int, dtype: torch.dtype, what: str) -> Tensor:
    """This rank's shard of rank 0's bucket."""
    groups = optimizer._groups
    if groups.replicas is None:
        return groups.shard.scatter_from_first(flat, numel, dtype, what)
    if groups.replicas.rank == 0:
        flat = groups.shard.scatter_from_first(flat, numel, dtype, what).repeat(groups.replicas.size)
    return groups.replicas.scatter_from_first(flat, numel, dtype, what)
