"""Divides the parameters of a ShardedOptimizer among the ranks."""

import functools
import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor

from arsg_dist.horovod.buckets import Layout, ParameterSpec, plan
from arsg_dist.horovod.partition import Partition
from arsg_dist.horovod.self_test import check_exchanges
from arsg_dist.horovod.state_entries import NUMBERS, adopt_state

if TYPE_CHECKING:
    from arsg_dist.horovod.shards import Shards


def lay_out(optimizer: "Shards") -> None:
    """Lays out parameters that are not yet, checks the exchanges at their sizes and takes over state. Collective.

    Raises:
        ValueError: the ranks have different parameters, arguments, settings or state.
        JobError: another rank raised it.
        RuntimeError: the exchanges return wrong data here.
    """
    first = len(optimizer._partitions)
    parts = optimizer._trained[first:]
    layouts = [
        plan(
            [ParameterSpec.of(name, parameter) for name, parameter in part],
            optimizer._groups.shard.size,
            optimizer._bucket_bytes,
        )
        for part in parts
    ]
    group_of = {
        id(parameter): index
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    indices = [[group_of[id(parameter)] for _, parameter in part] for part in parts]
    _compare_ranks(optimizer, layouts, indices)
    for number, (part, layout, groups) in enumerate(zip(parts, layouts, indices, strict=True)):
        if layout.buckets:
            _check_exchanges(optimizer, layout, part[0][1])
        # A parameter frozen since it was first laid out takes no hook otherwise.
        frozen = [parameter for _, parameter in part if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        partition = Partition(
            layout,
            [parameter for _, parameter in part],
            groups,
            optimizer._groups,
            optimizer._exchange,
            optimizer.backward_passes_per_step,
            functools.partial(_unscale, weakref.ref(optimizer)),
            optimizer._pending,
            label=f"part{first + number}",
        )
        for parameter in frozen:
            parameter.requires_grad_(False)
        optimizer._partitions.append(partition)
        adopt_state(optimizer, partition)


def _compare_ranks(optimizer: "Shards", layouts: list[Layout], indices: list[list[int]]) -> None:
    """Raises ValueError on every rank unless all ranks bring the same, and says in what they differ. Collective."""
    mine = _described(optimizer, layouts, indices)
    with optimizer._groups.world.fail_together():
        others = optimizer._groups.world.all_gather_object(mine, "layout")
        differing = [rank for rank, other in enumerate(others) if other != others[0]]
        if differing:
            what = [key for key in mine if any(other[key] != others[0][key] for other in others)]
            raise ValueError(
                f"{'; '.join(what)} of rank {', '.join(map(str, differing))} differ from rank 0's: build the same "
                "model and optimizer on every rank"
            )


def _described(optimizer: "Shards", layouts: list[Layout], indices: list[list[int]]) -> dict[str, Any]:
    """What must be the same on every rank, by how it is called in messages."""
    exchange = optimizer._exchange
    described: dict[str, Any] = {
        "parameters (names, order, shapes, dtypes, groups, requires_grad) or bucket_mb": (
            [layout.fingerprint() for layout in layouts],
            indices,
        ),
        "backward_passes_per_step, op, gradient_predivide_factor, compression or reduce_scatter": (
            optimizer.backward_passes_per_step,
            (exchange.prescale, exchange.postscale),
            _named(exchange.compression),
            _named(type(exchange.reduce_scatter.exchange)),
        ),
    }
    # In an elastic job all ranks load the rest next, and one that has just joined has settings of its own until then.
    if not optimizer._elastic:
        described["class of the optimizer or settings of its groups (lr, ...)"] = (
            _named(type(optimizer._inner.optimizer)),
            [
                {
                    name: _value(value)
                    for name, value in group.items()
                    if name not in ("params", "param_names")
                }
                for group in optimizer.param_groups
            ],
        )
        described[
            "optimizer state (load it on every rank before wrapping, or after it by load_state_dict())"
        ] = [
            {name: _kind(name, value) for name, value in optimizer._whole_state.get(parameter, {}).items()}
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
    return described


def _value(value: Any) -> str:
    """A setting as text: equal exactly if the values are, for tensors, numbers and texts; else the type's name."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.tolist()}"
    if isinstance(value, (tuple, list)):
        return str([_value(item) for item in value])
    plain = isinstance(value, (bool, int, float, complex, str, type(None)))
    return repr(value) if plain else _named(type(value))


def _kind(name: str, value: Any) -> str:
    """Of state with one number per element its form only."""
    per_element = isinstance(value, Tensor) and value.dim() and name not in NUMBERS
    return f"{value.dtype} {tuple(value.shape)}" if per_element else _value(value)


def _named(kind: Any) -> str:
    return f"{kind.__module__}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"


def _unscale(sharded: "weakref.ref[Shards]", found_inf: Tensor, inv_scale: Tensor) -> None:
    """Every partition's gradients, whichever of them GradScaler has met on this rank. Collective."""
    optimizer = sharded()
    assert optimizer is not None, "GradScaler was given it"
    for partition in optimizer._partitions:
        partition.gradients.unscale(found_inf, inv_scale)


def _check_exchanges(optimizer: "Shards", layout: Layout, parameter: Tensor) -> None:
    sizes = {
        (bucket.numel, layout.arenas[bucket.arena][0], parameter.device): None for bucket in layout.buckets
    }
    check_exchanges(optimizer._groups.shard, optimizer._exchange.reduce_scatter.exchange, list(sizes))
