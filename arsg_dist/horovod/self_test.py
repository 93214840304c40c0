"""Proves at start-up that the exchanges of a sharded optimizer return what they should, at the sizes it will use."""

from collections.abc import Sequence

import torch
from torch import Tensor

from arsg_dist.horovod.exchange import Group, ReduceScatter, start_all_gather


def check_exchanges(
    group: Group,
    reduce_scatter: ReduceScatter,
    sizes: Sequence[tuple[int, torch.dtype, torch.device]],
    *,
    rounds: int = 3,
) -> None:
    """Reduce-scatters and all-gathers whole numbers, several buckets under way at once, and compares bit by bit.

    Args:
        group: every rank of it must call this.
        reduce_scatter: the chosen path.
        sizes: (elements of a bucket, dtype, device) to try.
        rounds: with other numbers each.

    Raises:
        RuntimeError: on every rank, if any rank received anything wrong.
    """
    wrong = 0
    for turn in range(rounds):
        buckets = [_numbers(*size, group.rank, group.size, turn) for size in sizes for _ in range(2)]
        started = [
            reduce_scatter.start(bucket, lambda received: received, f"test{index}")
            for index, bucket in enumerate(buckets)
        ]
        for bucket, exchange in zip(buckets, started, strict=True):
            shard = exchange.finish()
            wrong += int((shard != _expected_sum(bucket, group, turn)).sum())
        wrong += _all_gather_errors(group, buckets, turn)
    errors = group.all_gather_object(wrong, "self-test")
    if any(errors):
        raise RuntimeError(
            f"the exchange of gradients is not reliable here: {type(reduce_scatter).__name__} returned "
            + ", ".join(f"{count} wrong numbers on rank {rank}" for rank, count in enumerate(errors) if count)
            + f" in {rounds} rounds of {[size[0] for size in sizes]} elements; no training was started. "
            "Use reduce_scatter='alltoall', and another backend (MPI, Gloo, NCCL) if it fails too"
        )


def _all_gather_errors(group: Group, buckets: Sequence[Tensor], turn: int) -> int:
    shards = [bucket.view(group.size, -1)[group.rank].clone() for bucket in buckets]
    gathered = [torch.zeros_like(bucket) for bucket in buckets]
    started = [
        start_all_gather(group, shard, target, f"test{index}")
        for index, (shard, target) in enumerate(zip(shards, gathered, strict=True))
    ]
    wrong = 0
    for target, exchange in zip(gathered, started, strict=True):
        exchange.finish()
        for rank, part in enumerate(target.view(group.size, -1)):
            sent = _numbers(target.numel(), target.dtype, target.device, rank, group.size, turn)
            wrong += int((part != sent.view(group.size, -1)[rank]).sum())
    return wrong


def _numbers(numel: int, dtype: torch.dtype, device: torch.device, rank: int, size: int, turn: int) -> Tensor:
    """Whole numbers that are exact in every dtype, as is their sum over the ranks in fp16."""
    index = torch.arange(numel, device=device)
    return ((index + index // 31 + 7 * rank + turn) % _modulus(size)).to(dtype)


def _modulus(size: int) -> int:
    return max(2, min(31, 2048 // size))


def _expected_sum(bucket: Tensor, group: Group, turn: int) -> Tensor:
    shard = bucket.numel() // group.size
    index = torch.arange(group.rank * shard, (group.rank + 1) * shard, device=bucket.device)
    total = torch.zeros(shard, dtype=torch.int64, device=bucket.device)
    for rank in range(group.size):
        total += (index + index // 31 + 7 * rank + turn) % _modulus(group.size)
    return total
