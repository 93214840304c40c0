"""Divides the parameters of a ShardedOptimizer among the ranks."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from arsg_dist.horovod.buckets import Layout, ParameterSpec, plan
from arsg_dist.horovod.partition import Partition
from arsg_dist.horovod.self_test import check_exchanges
from arsg_dist.horovod.state_entries import adopt_state

if TYPE_CHECKING:
    from arsg_dist.horovod.shards import Shards


def lay_out(optimizer: "Shards") -> None:
    """Lays out parameters that are not yet, checks the exchanges at their sizes and takes over state. Collective.

    Raises:
        ValueError: the ranks have different parameters or arguments.
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
            label=f"part{first + number}",
        )
        for parameter in frozen:
            parameter.requires_grad_(False)
        optimizer._partitions.append(partition)
        adopt_state(optimizer, partition)


def _compare_ranks(optimizer: "Shards", layouts: list[Layout], indices: list[list[int]]) -> None:
    described: Any = (
        [layout.fingerprint() for layout in layouts],
        indices,
        optimizer.backward_passes_per_step,
        str(optimizer._exchange.postscale),
    )
    with optimizer._groups.world.fail_together():
        others = optimizer._groups.world.all_gather_object(described, "layout")
        differing = [rank for rank, other in enumerate(others) if other != others[0]]
        if differing:
            raise ValueError(
                f"the parameters (names, order, shapes, dtypes, groups, requires_grad) or arguments of rank "
                f"{', '.join(map(str, differing))} differ from rank 0's: build the same model and optimizer on "
                "every rank"
            )


def _check_exchanges(optimizer: "Shards", layout: Layout, parameter: Tensor) -> None:
    sizes = {
        (bucket.numel, layout.arenas[bucket.arena][0], parameter.device): None for bucket in layout.buckets
    }
    check_exchanges(optimizer._groups.shard, optimizer._exchange.reduce_scatter.exchange, list(sizes))
