"""Products too large for one run of the tests: each run takes a part, as the commit has it."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

TURNS = 12
"""Of CI. A test with the mark `turn(n)` runs in a third of them, one with `turn(n, of=12)` in one."""

Case = TypeVar("Case")


def parts() -> Iterator[tuple[str, list[Any]]]:
    """The name of each part, "0" to "11", and the marks of its tests."""
    import pytest  # which a rank does without

    for number in range(TURNS):
        yield str(number), [pytest.mark.turn(number, of=TURNS)]


def part_of(cases: Sequence[Case], name: str) -> Sequence[Case]:
    """Every twelfth case."""
    return cases[int(name) :: TURNS]
