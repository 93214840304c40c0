"""Clipping gradients of which every rank holds a part."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from arsg_dist.horovod.group import Group
from arsg_dist.horovod.partition import Partition


def clip_shards(
    partitions: Sequence[Partition],
    group: Group,
    max_norm: float,
    norm_type: float,
    *,
    error_if_nonfinite: bool,
    parameters: Iterable[Tensor] | None,
) -> Tensor:
    """See `ShardedOptimizer.clip_grad_norm_`; the gradients are synchronized. Collective over `group`."""
    chosen = None if parameters is None else {id(parameter) for parameter in parameters}
    shards = [
        partition.gradients.shard(segment.bucket).narrow(0, segment.start, segment.numel)
        for partition in partitions
        for segment, _ in partition.pieces
        if (chosen is None or id(partition.parameters[segment.parameter]) in chosen)
        and partition.parameters[segment.parameter].requires_grad
    ]
    largest = norm_type == float("inf")
    # In fp64, so that the norm hardly depends on where parameters are cut.
    mine = torch.zeros((), dtype=torch.float64, device=partitions[0].parameters[0].device)
    for shard in shards:
        norm = torch.linalg.vector_norm(shard, norm_type, dtype=torch.float64)
        mine = torch.maximum(mine, norm) if largest else mine + norm**norm_type
    total = group.max(mine, "norm") if largest else group.sum(mine, "norm") ** (1.0 / norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the norm of order {norm_type} of the gradients is {float(total)}")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for shard in shards:
        shard.mul_(factor)
    return total.to(torch.float32)
