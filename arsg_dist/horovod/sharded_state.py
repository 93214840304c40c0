"""State between shards and the form of an optimizer that is not sharded."""

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arsg_dist.horovod.exchange import sum_dtype
from arsg_dist.horovod.partition import Partition

if TYPE_CHECKING:
    from arsg_dist.horovod.sharded import ShardedOptimizer

# State entries that are one number per parameter though they are tensors: torch.optim's.
_NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})
_MASTER = "master_params"
_HELD = "held_by_rank_0"


def check_state(named: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError if an optimizer has state that cannot be cut up."""
    for name, parameter in named:
        for entry, value in optimizer.state.get(parameter, {}).items():
            _is_per_element(name, entry, value, parameter)


def adopt_state(optimizer: "ShardedOptimizer", partition: Partition) -> None:
    """Cuts up the state that the given optimizer had for a partition's parameters."""
    for segment, piece in partition.pieces:
        parameter = partition.parameters[segment.parameter]
        spec = partition.layout.parameters[segment.parameter]
        whole = optimizer._whole_state.get(parameter)
        if whole:
            optimizer._inner.state[piece] = {
                name: (
                    spec.flat(value).narrow(0, segment.parameter_start, segment.numel).clone()
                    if _is_per_element(spec.name, name, value, parameter)
                    else copy.deepcopy(value)
                )
                for name, value in whole.items()
            }
    for parameter in partition.parameters:
        optimizer._whole_state.pop(parameter, None)


def _is_per_element(parameter_name: str, name: str, value: Any, parameter: Tensor) -> bool:
    """Whether a state entry has one number per element, rather than one per parameter.

    Raises:
        ValueError: neither.
    """
    if not isinstance(value, Tensor) or name in _NUMBERS:
        return False
    if value.shape == parameter.shape:
        return True
    if value.dim() == 0:
        return False
    raise ValueError(
        f"state {name!r} of {parameter_name} has shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}: "
        "only state of the parameter's shape, or one number, can be sharded"
    )


def _indices(optimizer: "ShardedOptimizer") -> dict[int, int]:
    """id(parameter) → its number in a state_dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {id(parameter): index for index, parameter in enumerate(parameters)}


def _packed_groups(optimizer: "ShardedOptimizer") -> list[dict[str, Any]]:
    index = _indices(optimizer)
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [index[id(parameter)] for parameter in group["params"]],
        }
        for group in optimizer.param_groups
    ]


def gather_state(optimizer: "ShardedOptimizer", *, everywhere: bool = False) -> dict[str, Any]:
    """The whole state on rank 0, or on every rank; see `ShardedOptimizer.state_dict`. Collective."""
    groups = optimizer._groups
    receives = everywhere or groups.world.rank == 0
    assert groups.replicas is None or not everywhere
    index = _indices(optimizer)
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
                if name == _MASTER:
                    masters[place] = tensor
                else:
                    state[place][name] = tensor
    packed = copy.deepcopy(_packed_groups(optimizer))
    if not receives:
        return {"state": {}, "param_groups": packed, _HELD: True}
    state |= _whole_entries(optimizer)
    result: dict[str, Any] = {
        "state": {place: state[place] for place in sorted(state)},
        "param_groups": packed,
    }
    if masters:
        result[_MASTER] = masters
    return result


def own_state(optimizer: "ShardedOptimizer") -> dict[str, Any]:
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
    if _MASTER in state:
        outline[_MASTER] = dict(state[_MASTER])
    for holder, key in tensors_of(outline):
        holder[key] = holder[key].to("meta")
    return outline


def _whole_entries(optimizer: "ShardedOptimizer") -> dict[int, dict[str, Any]]:
    index = _indices(optimizer)
    return {index[id(p)]: copy.deepcopy(entry) for p, entry in optimizer._whole_state.items()}


def tensors_of(state: dict[str, Any]) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Where a state has tensors with elements, as (dict, key), in an order that depends on the keys only."""
    for holder in (*state["state"].values(), state.get(_MASTER, {})):
        for key, value in holder.items():
            if isinstance(value, Tensor) and value.dim():
                yield holder, key


Entries = dict[int, dict[str, tuple[str, Any]]]


def _entries(optimizer: "ShardedOptimizer", partition: Partition) -> Entries:
    """What state each parameter of a partition has: name → ("number", value) or ("tensor", dtype). Collective."""
    mine: Entries = {}
    for segment, piece in partition.pieces:
        held = optimizer._inner.state.get(piece, {})
        mine[segment.parameter] = {
            name: (
                ("tensor", value.dtype)
                if isinstance(value, Tensor) and name not in _NUMBERS and value.shape == piece.shape
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
            found.setdefault((_MASTER, sum_dtype(spec.dtype)), []).append(parameter)
    for (name, dtype), parameters in sorted(found.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        yield name, parameters, dtype


def _gather_entry(
    optimizer: "ShardedOptimizer",
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
                value = piece if name == _MASTER else optimizer._inner.state[piece][name]
                shard.narrow(0, segment.start, segment.numel).copy_(value)
        received = (group.gather_to_all if everywhere else group.gather_to_first)(shard, what)
        if receives:
            assert received is not None
            for segment in segments:
                flat = layout.parameters[segment.parameter].flat(whole[segment.parameter])
                flat.narrow(0, segment.parameter_start, segment.numel).copy_(
                    received.narrow(0, segment.start, segment.numel)
                )
    return whole


def load_state(optimizer: "ShardedOptimizer", state_dict: dict[str, Any] | None) -> None:
    """See `ShardedOptimizer.load_state_dict`. Collective."""
    world = optimizer._groups.world
    holds = state_dict is not None and not state_dict.get(_HELD, False)
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
    index = _indices(optimizer)
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
        parameters[place]: copy.deepcopy(entry) for place, entry in (kept or {}).items()
    }
    optimizer._inner.load(copy.deepcopy(groups), loaded)
    for partition in optimizer._partitions:
        partition.take_gradients_back()


def _check_fit(optimizer: "ShardedOptimizer", state_dict: dict[str, Any]) -> None:
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
            _is_per_element(f"parameter {place}", name, value, parameters[place])
    for place, master in state_dict.get(_MASTER, {}).items():
        if master.shape != parameters[place].shape:
            raise ValueError(
                f"{_MASTER} {place} has shape {tuple(master.shape)}, not {tuple(parameters[place].shape)}"
            )


def _outline(
    optimizer: "ShardedOptimizer", state_dict: dict[str, Any] | None
) -> tuple[list[dict[str, Any]], Entries]:
    """The groups, and what state each parameter has: name → ("tensor", dtype) or ("number", value)."""
    assert state_dict is not None
    masters = state_dict.get(_MASTER, {})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: Entries = {}
    for place in sorted({*state_dict["state"], *masters}):
        entries[place] = {
            name: (
                ("tensor", value.dtype)
                if _is_per_element(str(place), name, value, parameters[place])
                else ("number", value)
            )
            for name, value in state_dict["state"].get(place, {}).items()
        }
        if place in masters:
            entries[place][_MASTER] = ("tensor", torch.float32)
    return state_dict["param_groups"], entries


def _load_partition(
    optimizer: "ShardedOptimizer",
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
        tensor: Tensor = state_dict[_MASTER][place] if name == _MASTER else state_dict["state"][place][name]
        return layout.parameters[parameter].flat(tensor)

    def put(piece: Tensor, name: str, part: Tensor) -> None:
        if name == _MASTER:
            piece.copy_(part)
        else:
            loaded[piece][name] = part.clone().to(piece.device)

    named: dict[tuple[str, torch.dtype], list[int]] = {}
    for parameter, known in kinds.items():
        own_dtype = layout.parameters[parameter].dtype
        for name, (kind, dtype) in known.items():
            # Full-precision parameters are their own masters, and are loaded with the model.
            if kind == "tensor" and (name != _MASTER or sum_dtype(own_dtype) != own_dtype):
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


def _scatter(
    optimizer: "ShardedOptimizer", flat: Tensor | None, numel: int, dtype: torch.dtype, what: str
) -> Tensor:
    """This rank's shard of rank 0's bucket."""
    groups = optimizer._groups
    if groups.replicas is None:
        return groups.shard.scatter_from_first(flat, numel, dtype, what)
    if groups.replicas.rank == 0:
        flat = groups.shard.scatter_from_first(flat, numel, dtype, what).repeat(groups.replicas.size)
    return groups.replicas.scatter_from_first(flat, numel, dtype, what)
