"""A job that came up on fewer hosts than it was started for ends before it trains, whatever the engine."""

from pathlib import Path

import pytest

from arsg_dist.engine import (
    ENGINES,
    JobError,
    SingleProcessCommunicator,
    check_hosts,
    discover_ranks,
    load_builder,
)
from arsg_dist.engine.hosts import EXPECTED_HOSTS, missing_hosts, this_host
from tests.support.launchers import launch


class _Scripted(SingleProcessCommunicator):
    """Rank 1 of 2; what rank 0 sends beside each of its messages is given."""

    rank, world_size = 1, 2

    def __init__(self, rank_0: list[str]) -> None:
        self._rank_0, self.closed = rank_0, False

    def all_gather_object(self, value):  # type: ignore[no-untyped-def]
        return [None if value is None else self._rank_0, value]

    def close(self) -> None:
        self.closed = True


def test_hosts_are_counted_once_each() -> None:
    """Catches ranks counted for hosts, and two containers of one machine, or two machines of one name, for one."""
    assert missing_hosts(2, ["a 1", "a 1", "b 1"]) == ""
    assert missing_hosts(2, ["node 1", "node 2"]) == ""
    assert missing_hosts(0, ["a 1"]) == ""
    message = missing_hosts(3, ["a 1", "a 1", "b 1"])
    assert "started for 3 hosts and its 3 ranks came up on 2: a, b." in message
    assert f"{EXPECTED_HOSTS}=2 lets this job pass" in message


def test_a_rank_that_was_not_told_learns_it_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that go on alone because their launcher lost the variable on the way."""
    monkeypatch.delenv(EXPECTED_HOSTS, raising=False)
    few = _Scripted(["2", this_host()])
    with pytest.raises(JobError, match="started for 2 hosts and its 2 ranks came up on 1"):
        check_hosts(few)
    assert few.closed
    enough = _Scripted(["2", "another host"])
    check_hosts(enough)
    assert not enough.closed
    monkeypatch.setenv(EXPECTED_HOSTS, "two")
    with pytest.raises(JobError, match="is not a number of hosts"):
        check_hosts(SingleProcessCommunicator())


def test_a_single_process_started_for_two_hosts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two jobs of one process each, where one job of two hosts was asked for."""
    monkeypatch.setenv(EXPECTED_HOSTS, "2")
    with pytest.raises(JobError, match="started for 2 hosts"):
        load_builder("single").connect(discover_ranks({}))


@pytest.mark.ranks
@pytest.mark.parametrize("engine", [name for name, entry in ENGINES.items() if entry.rendezvous])
def test_every_engine_refuses_on_every_rank(engine: str, tmp_path: Path) -> None:
    """Catches an engine whose ranks train on one host where two were asked for, and a rank that does not hear of it."""
    launcher = "warm horovodrun" if ENGINES[engine].rendezvous == "horovod" else "warm deepspeed"
    job = launch(
        launcher, 2, "tests/engines/jobs/few_hosts.py", tmp_path, engine, variables={EXPECTED_HOSTS: "2"}
    )  # fmt: skip
    assert job.code == 0, job.output[-5000:]
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert "started for 2 hosts and its 2 ranks came up on 1" in said
