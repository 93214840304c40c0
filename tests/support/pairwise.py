"""Few cases in which every two values of different factors meet."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_CANDIDATES = 200

Row = dict[str, Any]
_Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairwise(
    factors: dict[str, Sequence[Any]], allowed: Callable[[Row], bool], *, known: Sequence[Row] = ()
) -> list[Row]:
    """Cover every pair of values that an allowed row can have; the same rows in every run.

    Args:
        factors: name of a factor → its values.
        allowed: whether a row makes sense.
        known: rows there are already, whose pairs need no other.
    """
    chance = random.Random(0)
    waiting = dict.fromkeys(_pairs_of_all(factors))
    for row in known:
        _strike(waiting, row)
    rows: list[Row] = []
    for pair in list(waiting):
        if pair not in waiting:
            continue
        drawn = [
            {**{name: chance.choice(values) for name, values in factors.items()}, **dict(pair)}
            for _ in range(_CANDIDATES)
        ]
        candidates = [row for row in drawn if allowed(row)]
        if candidates:
            rows.append(max(candidates, key=lambda row: sum(p in waiting for p in _pairs(row))))
            _strike(waiting, rows[-1])
    return rows


def _strike(waiting: dict[_Pair, None], row: Row) -> None:
    for pair in _pairs(row):
        waiting.pop(pair, None)


def _pairs(row: Row) -> Iterator[_Pair]:
    yield from itertools.combinations(row.items(), 2)


def _pairs_of_all(factors: dict[str, Sequence[Any]]) -> Iterator[_Pair]:
    for (one, values), (other, others) in itertools.combinations(factors.items(), 2):
        for value, second in itertools.product(values, others):
            yield (one, value), (other, second)
