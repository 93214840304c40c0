"""The whole state of a sharded optimizer, gathered tensor by tensor and bucket by bucket."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arsg_dist.horovod.exchange import sum_dtype
from arsg_dist.horovod.partition import Partition
from arsg_dist.horovod.state_entries import HELD, MASTER, NUMBERS, Entries, indices

if TYPE_CHECKING:
    from arsg_dist.horovod.shards import Shards


def gather_state(optimizer: "Shards", *, everywhere: bool = False) -> dict[str, Any]:
    """The whole state on rank 0, or on every rank; see `ShardedOptimizer.state_dict`. Collective."""
    groups = optimizer._groups
    receives = everywhere or groups.world.rank == 0
    assert groups.replicas is None or not everywhere
    index = indices(optimizer)
    state: dict[int, dict[str, Any]] = {}
    masters: dict[int, Tensor] = {}
    for number, partition in enumerate(optimizer._partitions):
        if groups.replicas is not None and groups.replicas.rank > 0:
            break  # the first group of shards has everything
        entries = _entries(optimizer, partition)
        for parameter, named in entries.items():
            state[index[id(partition.parameters[parameter])]] = {
                name: value if kind == "number" else None for name, (kind, value) in named.items()
            }
        for name, parameters, dtype in _tensor_entries(partition, entries):
            what = f"state{number}.{name}"
            whole = _gather_entry(optimizer, partition, what, name, parameters, dtype, everywhere)
            for number_in_partition, tensor in whole.items():
                place = index[id(partition.parameters[number_in_partition])]
                if name == MASTER:
                    masters[place] = tensor
                else:
                    state[place][name] = tensor
    packed = copy.deepcopy(_packed_groups(optimizer))
    if not receives:
        return {"state": {}, "param_groups": packed, HELD: True}
    state |= _whole_entries(optimizer)
    result: dict[str, Any] = {
        "state": {place: state[place] for place in sorted(state)},
        "param_groups": packed,
    }
    if masters:
        result[MASTER] = masters
    return result


def own_state(optimizer: "Shards") -> dict[str, Any]:
    """The state this rank's optimizer was given, before anything was sharded, on CPU; of this rank alone."""
    state = _whole_entries(optimizer)
    return {
        "state": {
            place: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state[place].items()}
            for place in sorted(state)
        },
        "param_groups": copy.deepcopy(_packed_groups(optimizer)),
    }


def outline_of(state: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors that have shape, stride and dtype only (device "meta")."""
    outline = {**state, "state": {place: dict(entry) for place, entry in state["state"].items()}}
    if MASTER in state:
        outline[MASTER] = dict(state[MASTER])
    for holder, key in tensors_of(outline):
        holder[key] = holder[key].to("meta")
    return outline


def _whole_entries(optimizer: "Shards") -> dict[int, dict[str, Any]]:
    index = indices(optimizer)
    return {index[id(p)]: copy.deepcopy(entry) for p, entry in optimizer._whole_state.items()}


def tensors_of(state: dict[str, Any]) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Where a state has tensors with elements, as (dict, key), in an order that depends on the keys only."""
    for holder in (*state["state"].values(), state.get(MASTER, {})):
        for key, value in holder.items():
            if isinstance(value, Tensor) and value.dim():
                yield holder, key


def _packed_groups(optimizer: "Shards") -> list[dict[str, Any]]:
    index = indices(optimizer)
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [index[id(parameter)] for parameter in group["params"]],
        }
        for group in optimizer.param_groups
    ]


def _entries(optimizer: "Shards", partition: Partition) -> Entries:
    """What state each parameter of a partition has: name → ("number", value) or ("tensor", dtype). Collective."""
    mine: Entries = {}
    for segment, piece in partition.pieces:
        held = optimizer._inner.state.get(piece, {})
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
    for rank_entries in optimizer._groups.shard.all_gather_object(mine, "state.entries"):
        for parameter, named in rank_entries.items():
            merged.setdefault(parameter, named)
    return {parameter: merged[parameter] for parameter in sorted(merged) if merged[parameter]}


def _tensor_entries(partition: Partition, entries: Entries) -> Iterator[tuple[str, list[int], torch.dtype]]:
    """(name, parameters that have it, dtype) of all state tensors, and of masters that a parameter does not hold."""
    found: dict[tuple[str, torch.dtype], list[int]] = {}
    for parameter, named in entries.items():
        for name, (kind, dtype) in named.items():
            if kind == "tensor":
                found.setdefault((name, dtype), []).append(parameter)
    for parameter, spec in enumerate(partition.layout.parameters):
        if spec.numel and sum_dtype(spec.dtype) != spec.dtype:
            found.setdefault((MASTER, sum_dtype(spec.dtype)), []).append(parameter)
    for (name, dtype), parameters in sorted(found.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        yield name, parameters, dtype


def _gather_entry(
    optimizer: "Shards",
    partition: Partition,
    what: str,
    name: str,
    parameters: list[int],
    dtype: torch.dtype,
    everywhere: bool,
) -> dict[int, Tensor]:
    """One state tensor of several parameters, whole, on rank 0 or everywhere; else empty. Collective."""
    group, layout = optimizer._groups.shard, partition.layout
    receives = everywhere or optimizer._groups.world.rank == 0
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
                value = piece if name == MASTER else optimizer._inner.state[piece][name]
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
