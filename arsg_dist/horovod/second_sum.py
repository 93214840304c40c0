"""Sums of gradients computed a second time by another rank, to catch a reduce-scatter that returns wrong ones.

A wrong sum of a sharded optimizer reaches every rank: its owner updates the shard with it and sends the result to all,
so that no comparison of weights can find it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from arsg_dist.engine.replica_check import fingerprint
from arsg_dist.horovod.buffer_pool import BufferPool
from arsg_dist.horovod.exchange import AllToAllReduceScatter, ReduceScatter, Started

_TOLERANCE = 1e-3


@dataclass(kw_only=True)
class _Twice(Started):
    """An exchange and its repetition, both under way."""

    first: Started
    second: Started
    compare: Callable[[Tensor, Tensor], None]

    def finish(self) -> Tensor:
        """Waits for both; returns the first's result."""
        first = self.first.finish()
        self.compare(first, self.second.finish())
        return first


class CheckedReduceScatter:
    """A reduce-scatter that can be told to have its sums checked: by the next rank, which receives the same shard.

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
        """As `AllToAllReduceScatter.start`."""
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
        """What was found wrong since the last call, the same on every rank; every rank must call it."""
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
