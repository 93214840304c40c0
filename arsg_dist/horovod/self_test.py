"""Proves at start-up that the exchanges of a sharded optimizer return what they should, at the sizes it will use."""

from collections.abc import Sequence

import torch
from torch import Tensor

from arsg_dist.horovod.buffer_pool import BufferPool
from arsg_dist.horovod.exchange import ReduceScatter, start_all_gather, sum_dtype
from arsg_dist.horovod.group import Group


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
    prepared = [_Numbers(*size, group) for size in sizes for _ in range(2)]
    for index, numbers in enumerate(prepared):
        numbers.add(index % 2)  # what belongs to one of two buckets is wrong in the other
    targets = [torch.zeros_like(numbers.mine) for numbers in prepared]
    wrong = 0
    pool = BufferPool()
    for turn in range(rounds):
        # From the second round on in memory that was used before, as in training.
        started = [
            reduce_scatter.start(numbers.mine, lambda received: received, f"test{index}", pool)
            for index, numbers in enumerate(prepared)
        ]
        for numbers, exchange in zip(prepared, started, strict=True):
            sums = exchange.finish()
            wrong += _differences(sums, numbers.sums)
            pool.give_back(sums)
        started = [
            start_all_gather(
                group,
                numbers.mine.view(group.size, -1)[group.rank],
                target.zero_(),
                f"test{index}",
                index,
                pool,
            )
            for index, (numbers, target) in enumerate(zip(prepared, targets, strict=True))
        ]
        for numbers, target, exchange in zip(prepared, targets, started, strict=True):
            exchange.finish()
            wrong += _differences(target, numbers.gathered)
            numbers.add(1 if (turn + 1) % _SHIFTS else 1 - _SHIFTS)
    errors = group.all_gather_object(wrong, "self-test")
    if any(errors):
        raise RuntimeError(
            f"the exchange of gradients is not reliable here: {type(reduce_scatter).__name__} returned "
            + ", ".join(f"{count} wrong numbers on rank {rank}" for rank, count in enumerate(errors) if count)
            + f" in {rounds} rounds of {[size[0] for size in sizes]} elements; no training was started. "
            "Use reduce_scatter='alltoall', and another backend (MPI, Gloo, NCCL) if it fails too"
        )


_SHIFTS = 8


def _differences(one: Tensor, other: Tensor) -> int:
    return 0 if torch.equal(one, other) else int((one != other).sum())


class _Numbers:
    """A bucket of small whole numbers, other ones on every rank, and what comes of exchanging it.

    Attributes:
        mine: this rank's bucket.
        sums: this rank's shard of the sum over the ranks.
        gathered: the bucket of which every rank sent the shard that it owns.
    """

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, group: Group) -> None:
        # Exact in bf16, and in fp16 the sum over the ranks.
        modulus = max(2, min(31, 2048 // group.size - _SHIFTS))
        index = torch.arange(numel, device=device)
        index = index + index // 31

        def bucket(rank: int) -> Tensor:
            return ((index + 7 * rank) % modulus).to(dtype)

        self._ranks = group.size
        self.mine = bucket(group.rank)
        shard = numel // group.size
        self.gathered = torch.empty_like(self.mine)
        self.sums = torch.zeros(shard, dtype=sum_dtype(dtype), device=device)
        for rank in range(group.size):
            other = bucket(rank)
            self.sums += other.narrow(0, group.rank * shard, shard)
            self.gathered.narrow(0, rank * shard, shard).copy_(other.narrow(0, rank * shard, shard))

    def add(self, number: int) -> None:
        """Makes them other numbers, in place."""
        self.mine += number
        self.gathered += number
        self.sums += number * self._ranks
