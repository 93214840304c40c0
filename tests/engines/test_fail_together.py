import pytest

from arsg_dist.engine import JobError, SingleProcessCommunicator


class _Scripted(SingleProcessCommunicator):
    """Rank 1 of 3; the others' messages are given."""

    rank, world_size = 1, 3

    def __init__(self, rank_0: str | None, rank_2: str | None) -> None:
        self._others = rank_0, rank_2

    def all_gather_object(self, value):  # type: ignore[no-untyped-def]
        return [self._others[0], value, self._others[1]]


def test_a_rank_without_a_fault_stops_when_another_has_one() -> None:
    """Catches ranks that go on alone and wait for ever."""
    with (
        pytest.raises(JobError, match=r"^no such file \(on rank 2\)$"),
        _Scripted(None, "no such file").fail_together(),
    ):
        pass


def test_the_same_fault_everywhere_is_said_once() -> None:
    """Catches a message repeated by every rank."""
    with pytest.raises(JobError, match=r"^bad$"), _Scripted("bad", "bad").fail_together():
        raise ValueError("bad")


def test_nothing_happens_without_a_fault_and_bugs_pass_through() -> None:
    """Catches a guard that always fires, or that hides a bug as bad input."""
    with _Scripted(None, None).fail_together():
        pass
    with pytest.raises(ZeroDivisionError), _Scripted(None, None).fail_together():
        _ = 1 / 0
