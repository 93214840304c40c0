"""Gather and load the whole state of a sharded optimizer, bucket by bucket."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from arsg_dist.horovod.comm.collectives import sum_dtype
from arsg_dist.horovod.comm.process_groups import ShardGroups
from arsg_dist.horovod.sharded.buckets import ParameterSpec
from arsg_dist.horovod.sharded.inner_optimizer import NUMBERS, InnerOptimizer, is_per_element
from arsg_dist.horovod.sharded.parameters import ShardedParameters
from arsg_dist.horovod.sharded.partition import Partition

MASTER = "master_params"
"""Key of the fp32 masters in a whole state."""
HELD = "held_by_rank_0"
"""Marks a state without tensors."""
Entries = dict[int, dict[str, tuple[str, Any]]]
"""What state parameters have: name → ("number", value) or ("tensor", dtype)."""


def gather_state(shards: ShardedParameters, inner: InnerOptimizer, *, everywhere: bool) -> dict[str, Any]:
    """Gather the whole state on rank 0, or on every rank. Collective.

    See `ShardedOptimizer.state_dict`.
    """
    groups = shards.groups
    receives = everywhere or groups.world.rank == 0
    assert groups.replicas is None or not everywhere
    index = _indices(inner)
    state: dict[int, dict[str, Any]] = {}
    masters: dict[int, Tensor] = {}
    for number, partition in enumerate(shards.partitions):
        if not groups.holds_first_copy:
            break  # the first group of shards has everything
        entries = _entries(groups, inner, partition)
        for parameter, named in entries.items():
            state[index[id(partition.parameters[parameter])]] = {
                name: value if kind == "number" else None for name, (kind, value) in named.items()
            }
        for parameter, spec in enumerate(partition.layout.parameters):
            if _has_master(spec):
                entries.setdefault(parameter, {})[MASTER] = ("tensor", sum_dtype(spec.dtype))
        for name, dtype, parameters in _tensor_entries(entries):
            what = f"state{number}.{name}"
            whole = _gather_entry(groups, inner, partition, what, name, parameters, dtype, everywhere)
            for number_in_partition, tensor in whole.items():
                place = index[id(partition.parameters[number_in_partition])]
                if name == MASTER:
                    masters[place] = tensor
                else:
                    state[place][name] = tensor
    packed = copy.deepcopy(_packed_groups(inner))
    if not receives:
        return {"state": {}, "param_groups": packed, HELD: True}
    state |= _whole_entries(inner)
    result: dict[str, Any] = {
        "state": {place: state[place] for place in sorted(state)},
        "param_groups": packed,
    }
    if masters:
        result[MASTER] = masters
    return result


def own_state(inner: InnerOptimizer) -> dict[str, Any]:
    """Copy to CPU the state this rank's optimizer was given, before any sharding."""
    state = _whole_entries(inner)
    return {
        "state": {
            place: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state[place].items()}
            for place in sorted(state)
        },
        "param_groups": copy.deepcopy(_packed_groups(inner)),
    }


def outline_of(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a state with tensors of shape, stride and dtype only (device "meta")."""
    outline = {**state, "state": {place: dict(entry) for place, entry in state["state"].items()}}
    if MASTER in state:
        outline[MASTER] = dict(state[MASTER])
    for holder, key in tensors_of(outline):
        holder[key] = holder[key].to("meta")
    return outline


def _indices(inner: InnerOptimizer) -> dict[int, int]:
    """Map id(parameter) to its number in a state_dict."""
    return {id(parameter): index for index, parameter in enumerate(inner.parameters)}


def _whole_entries(inner: InnerOptimizer) -> dict[int, dict[str, Any]]:
    index = _indices(inner)
    return {index[id(p)]: copy.deepcopy(entry) for p, entry in inner.whole_state.items()}


def tensors_of(state: dict[str, Any]) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Yield where a state has tensors, as (dict, key), in the order of the keys."""
    for holder in (*state["state"].values(), state.get(MASTER, {})):
        for key, value in holder.items():
            if isinstance(value, Tensor) and value.dim():
                yield holder, key


def _packed_groups(inner: InnerOptimizer) -> list[dict[str, Any]]:
    index = _indices(inner)
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [index[id(parameter)] for parameter in group["params"]],
        }
        for group in inner.groups
    ]


def _entries(groups: ShardGroups, inner: InnerOptimizer, partition: Partition) -> Entries:
    """Find out what state each parameter of a partition has. Collective."""
    mine: Entries = {}
    for segment, piece in partition.pieces:
        held = inner.state.get(piece, {})
        mine[segment.parameter] = {
            name: (
                ("tensor", value.dtype)
                if isinstance(value, Tensor) and name not in NUMBERS and value.shape == piece.shape
                else ("number", value)
            )
            for name, value in held.items()
        }
        unknown = [
            name
            for name, (kind, value) in mine[segment.parameter].items()
            if kind == "number" and isinstance(value, Tensor) and value.numel() != 1
        ]
        if unknown:
            raise RuntimeError(
                f"state {unknown} is neither per element nor one number: it cannot be gathered"
            )
    merged: Entries = {}
    for rank_entries in groups.shard.all_gather_object(mine, "state.entries"):
        for parameter, named in rank_entries.items():
            merged.setdefault(parameter, named)
    return {parameter: merged[parameter] for parameter in sorted(merged) if merged[parameter]}


def _tensor_entries(entries: Entries) -> list[tuple[str, torch.dtype, list[int]]]:
    """List all state tensors: name, dtype, parameters that have it."""
    found: dict[tuple[str, torch.dtype], list[int]] = {}
    for parameter, named in entries.items():
        for name, (kind, dtype) in named.items():
            if kind == "tensor":
                found.setdefault((name, dtype), []).append(parameter)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], str(item[0][1])))
    return [(name, dtype, parameters) for (name, dtype), parameters in ordered]


def _has_master(spec: ParameterSpec) -> bool:
    """Tell whether a parameter is not its own master."""
    return bool(spec.numel) and sum_dtype(spec.dtype) != spec.dtype


def _gather_entry(
    groups: ShardGroups,
    inner: InnerOptimizer,
    partition: Partition,
    what: str,
    name: str,
    parameters: list[int],
    dtype: torch.dtype,
    everywhere: bool,
) -> dict[int, Tensor]:
    """Gather a state tensor of several parameters. Collective."""
    group, layout = groups.shard, partition.layout
    receives = everywhere or groups.world.rank == 0
    wanted = set(parameters)
    whole = (
        {
            parameter: torch.empty_strided(
                layout.parameters[parameter].shape, layout.parameters[parameter].stride, dtype=dtype
            )
            for parameter in parameters
        }
        if receives
        else {}
    )
    for bucket in layout.buckets:
        segments = [s for s in layout.segments if s.bucket == bucket.index and s.parameter in wanted]
        if not segments:
            continue
        shard = torch.zeros(bucket.shard_numel, dtype=dtype)
        for segment, piece in partition.pieces:
            if segment.bucket == bucket.index and segment.parameter in wanted:
                value = piece if name == MASTER else inner.state[piece][name]
                shard.narrow(0, segment.start, segment.numel).copy_(value)
        received = (group.gather_to_all if everywhere else group.gather_to_first)(shard, what)
        if receives:
            assert received is not None
            for segment in segments:
                flat = layout.parameters[segment.parameter].flat(whole[segment.parameter])
                flat.narrow(0, segment.parameter_start, segment.numel).copy_(
                    received.narrow(0, segment.start, segment.numel)
                )
        del received  # before the next bucket's arrives
    return whole


def load_state(shards: ShardedParameters, inner: InnerOptimizer, state_dict: dict[str, Any] | None) -> None:
    """Load a whole state, of which every rank keeps its part. Collective.

    See `ShardedOptimizer.load_state_dict`.
    """
    world = shards.groups.world
    holds = state_dict is not None and not state_dict.get(HELD, False)
    with world.fail_together():
        if holds:
            assert state_dict is not None
            _check_fit(inner, state_dict)
    everywhere = world.all_gather_object(holds, "load.holds")
    if not everywhere[0]:
        raise ValueError(
            "load_state_dict: rank 0 was given no whole state (only rank 0 gets one from state_dict())"
        )
    outline = _outline(inner, state_dict) if holds else None
    outlines = world.all_gather_object(outline, "load.outline")
    if any(other is not None and not _alike(other, outlines[0]) for other in outlines):
        raise ValueError("load_state_dict: the ranks were given different states")
    assert outlines[0] is not None
    groups, entries = outlines[0]
    index = _indices(inner)
    loaded: dict[Tensor, dict[str, Any]] = {}
    for number, partition in enumerate(shards.partitions):
        _load_partition(
            shards.groups,
            partition,
            number,
            index,
            entries,
            state_dict if holds else None,
            all(everywhere),
            loaded,
        )
    sharded = {index[id(p)] for partition in shards.partitions for p in partition.parameters}
    kept = world.all_gather_object(
        {place: entry for place, entry in (state_dict or {}).get("state", {}).items() if place not in sharded}
        if world.rank == 0
        else None,
        "load.frozen",
    )[0]
    parameters = inner.parameters
    whole_state = {
        parameters[place]: {
            # What has one number per element was on the parameter's device, and came by way of main memory.
            name: value.to(parameters[place].device) if isinstance(value, Tensor) and value.dim() else value
            for name, value in entry.items()
        }
        for place, entry in (kept or {}).items()
    }
    inner.load(copy.deepcopy(groups), loaded, whole_state)
    shards.take_gradients_back()


def _alike(one: Any, other: Any) -> bool:
    """Tell whether two outlines say the same: a tensor's text has four digits only, and names its device."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and repr(one.tolist()) == repr(other.tolist())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_alike, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


def _check_fit(inner: InnerOptimizer, state_dict: dict[str, Any]) -> None:
    """Raise ValueError unless the state's groups and shapes fit the parameters."""
    mine = [len(group["params"]) for group in inner.groups]
    theirs = [len(group["params"]) for group in state_dict["param_groups"]]
    if mine != theirs:
        raise ValueError(
            f"the state has groups of {theirs} parameters and the optimizer has groups of {mine}: it is not the state "
            "of this model and these groups"
        )
    parameters = inner.parameters
    for place, entry in state_dict["state"].items():
        for name, value in entry.items():
            is_per_element(f"parameter {place}", name, value, parameters[place])
    for place, master in state_dict.get(MASTER, {}).items():
        if master.shape != parameters[place].shape:
            raise ValueError(
                f"{MASTER} {place} has shape {tuple(master.shape)}, not {tuple(parameters[place].shape)}"
            )


def _outline(
    inner: InnerOptimizer, state_dict: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], Entries]:
    """Return the groups, and what state each parameter has."""
    assert state_dict is not None
    masters = state_dict.get(MASTER, {})
    parameters = inner.parameters
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
    groups: ShardGroups,
    partition: Partition,
    number: int,
    index: dict[int, int],
    entries: Entries,
    state_dict: dict[str, Any] | None,
    local: bool,
    loaded: dict[Tensor, dict[str, Any]],
) -> None:
    """Fill `loaded` (piece → state) and the masters with this rank's part. Collective."""
    layout = partition.layout
    place_of = [index[id(parameter)] for parameter in partition.parameters]
    kinds: Entries = {
        parameter: {
            name: kind
            for name, kind in entries[place].items()
            # Full-precision parameters are their own masters, and are loaded with the model.
            if name != MASTER or _has_master(layout.parameters[parameter])
        }
        for parameter, place in enumerate(place_of)
        if place in entries
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

    for name, dtype, parameters in _tensor_entries(kinds):
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
            if groups.world.rank == 0:
                flat = torch.zeros(bucket.numel, dtype=dtype)
                for segment in segments:
                    part = whole(segment.parameter, name).narrow(0, segment.parameter_start, segment.numel)
                    flat.narrow(0, segment.start, segment.numel).copy_(part)
            shard = _scatter(groups, flat, bucket.shard_numel, dtype, f"load{number}.{name}")
            for segment, piece in partition.pieces:
                if segment.bucket == bucket.index and segment.parameter in wanted:
                    put(piece, name, shard.narrow(0, segment.start, segment.numel))


def _scatter(groups: ShardGroups, flat: Tensor | None, numel: int, dtype: torch.dtype, what: str) -> Tensor:
    """Scatter rank 0's bucket; return this rank's shard. Collective."""
    if groups.replicas is None:
        return groups.shard.scatter_from_first(flat, numel, dtype, what)
    if groups.replicas.rank == 0:
        flat = groups.shard.scatter_from_first(flat, numel, dtype, what).repeat(groups.replicas.size)
    return groups.replicas.scatter_from_first(flat, numel, dtype, what)
