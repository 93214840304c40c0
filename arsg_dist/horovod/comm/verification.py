"""Verify collectives: a self-test at start-up, a redundant reduction later.

A wrong sum of a sharded optimizer reaches every rank: its owner updates the shard with it and sends the result to all,
so that no comparison of weights can find it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arsg_dist.engine.consistency import fingerprint
from arsg_dist.horovod.comm.collectives import (
    AllToAllReduceScatter,
    BufferPool,
    ReduceScatter,
    Started,
    start_all_gather,
    sum_dtype,
)
from arsg_dist.horovod.comm.process_groups import Group

_TOLERANCE = 1e-3


@dataclass(kw_only=True)
class _Twice(Started):
    """Hold a reduce-scatter and its repetition, both pending."""

    first: Started
    second: Started
    compare: Callable[[Tensor, Tensor], None]

    def finish(self) -> Tensor:
        """Wait for both; return the first's result."""
        first = self.first.finish()
        self.compare(first, self.second.finish())
        return first


class CheckedReduceScatter:
    """Reduce-scatter, and on demand have the next rank check the sums.

    Args:
        exchange: does the work.

    Attributes:
        checking: whether exchanges that start now are done twice; the same on every rank.
    """

    def __init__(self, exchange: ReduceScatter) -> None:
        self.exchange, self.group = exchange, exchange.group
        self.checking = False
        self._second = AllToAllReduceScatter(exchange.group)
        self._sums: dict[str, tuple[Any, Any]] = {}

    def start(self, wire: Tensor, decode: Callable[[Tensor], Tensor], name: str, pool: BufferPool) -> Started:
        """Begin as `AllToAllReduceScatter.start`. Collective."""
        started = self.exchange.start(wire, decode, name, pool)
        if not self.checking or self.group.size == 1:
            return started
        shifted = wire.view(self.group.size, -1).roll(-1, 0).view(-1)

        def compare(mine: Tensor, next_rank: Tensor) -> None:
            self._sums[name] = self._summary(mine), self._summary(next_rank)
            pool.give_back(next_rank)

        second = self._second.start(shifted, decode, f"{name}.second", pool)
        return _Twice(started.handle, started.result, first=started, second=second, compare=compare)

    def _summary(self, total: Tensor) -> Any:
        if isinstance(self.exchange, AllToAllReduceScatter):
            return int(fingerprint(total))  # both add in the same order: the same bits
        exact = total.double()
        return exact.sum().item(), exact.square().sum().item(), exact.abs().sum().item()

    def faults(self) -> list[str]:
        """Return what was wrong since the last call, the same on every rank. Collective."""
        of_ranks = self.group.all_gather_object(self._sums, "second sums")
        self._sums = {}
        size = self.group.size
        return [
            f"the sum of {name} that rank {owner} received is not the one that rank {(owner - 1) % size} computed "
            "from the same gradients"
            for owner in range(size)
            for name, (mine, _) in sorted(of_ranks[owner].items())
            if not _same(mine, of_ranks[(owner - 1) % size][name][1])
        ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int):
        return bool(one == other)
    (sum_1, squares_1, size), (sum_2, squares_2, _) = one, other
    return bool(
        abs(sum_1 - sum_2) <= _TOLERANCE * size and abs(squares_1 - squares_2) <= _TOLERANCE * squares_1
    )


def check_exchanges(
    group: Group,
    reduce_scatter: ReduceScatter,
    sizes: Sequence[tuple[int, torch.dtype, torch.device]],
    *,
    rounds: int = 3,
) -> None:
    """Test at start-up that collectives return what they should. Collective.

    Reduce-scatters and all-gathers whole numbers at the sizes of training, several buckets under way at once, and
    compares bit by bit.

    Args:
        group: the ranks.
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
    """Hold a bucket of small whole numbers, and what collectives must make of it.

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
        """Make them other numbers, in place."""
        self.mine += number
        self.gathered += number
        self.sums += number * self._ranks
