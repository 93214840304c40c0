import threading
from pathlib import Path
from typing import Any, TypeVar

import pytest

from arsg_dist.engine import Communicator, JobError, check_agreement, consistency
from tests.support.launchers import Finished, launch

T = TypeVar("T")


class ThreadCommunicator(Communicator):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def all_gather_object(self, value: T) -> list[T]:
        self._shared[self.rank] = value
        self._barrier.wait(120)
        values = list(self._shared)
        self._barrier.wait(120)
        return values

    def all_reduce_sum(self, tensor: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None: ...


def messages(*values_of_ranks: dict[str, Any]) -> list[str | None]:
    """What each rank raised."""
    raised: list[str | None] = [None] * len(values_of_ranks)
    shared: list[Any] = [None] * len(values_of_ranks)
    barrier = threading.Barrier(len(values_of_ranks))

    def rank(index: int) -> None:
        try:
            check_agreement(ThreadCommunicator(index, shared, barrier), **values_of_ranks[index])
        except JobError as error:
            raised[index] = str(error)

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(len(values_of_ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return raised


def test_ranks_that_agree_go_on() -> None:
    """Catches a comparison that depends on the order of keys."""
    assert messages({"config": {"a": 1, "b": [2]}}, {"config": {"b": [2], "a": 1}}) == [None, None]


def test_every_rank_names_the_setting_and_the_ranks_that_differ() -> None:
    """Catches 'the config differs' without saying where, or a rank that goes on alone."""
    config = {"optimizer": {"lr": 0.1}, "seed": 0}
    other = {"optimizer": {"lr": 0.2}, "seed": 0}
    raised = messages({"config": config}, {"config": other}, {"config": config}, {"config": other})
    assert raised == ["the config optimizer lr of rank 1, 3 differs from rank 0's: 0.2 and 0.1"] * 4


def test_a_value_that_only_some_ranks_have_is_named() -> None:
    """Catches a missing key taken for agreement."""
    raised = messages({"config": {"a": 1}}, {"config": {"a": 1, "b": None}})
    assert raised == ["the config b of rank 1 differs from rank 0's: null and nothing"] * 2


def test_package_versions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host with another environment, whose ranks would compute something slightly different."""
    versions = iter([{"torch": "2.13.0"}, {"torch": "2.12.0"}])
    lock = threading.Lock()

    def next_version() -> dict[str, str]:
        with lock:
            return next(versions)

    monkeypatch.setattr(consistency, "package_versions", next_version)
    raised = messages({}, {})
    assert raised[0] == raised[1]
    assert raised[0] is not None
    assert raised[0].startswith("the version torch of rank 1 differs")


def test_versions_of_what_is_installed_are_known() -> None:
    """Catches a table of packages that are all 'not installed'."""
    versions = consistency.package_versions()
    assert versions["torch"].startswith("2.")
    assert versions["python"].startswith("3.")


@pytest.mark.ranks
def test_ranks_with_different_settings_stop_in_seconds() -> None:
    """Catches a job that trains with two learning rates, or hangs over it."""
    job: Finished = launch("warm deepspeed", 2, "tests/support/disagreeing_job.py")
    assert job.code != 0
    assert job.output.count("the config lr of rank 1 differs from rank 0's: 0.2 and 0.1") == 2


def test_another_source_with_the_same_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host with another checkout of the same version."""
    digests = iter(["one", "two"])
    monkeypatch.setattr(consistency, "code_digest", lambda: next(digests))
    for message in messages({}, {}):
        assert message is not None
        assert message.startswith("the code of arsg-dist of rank 1 differs from rank 0's")


def test_the_digest_of_the_code_sees_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a digest that stays the same when a file deep in the package is edited."""
    package = tmp_path / "arsg_dist"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "deep" / "code.py").write_text("x = 1")
    monkeypatch.setattr(consistency.arsg_dist, "__file__", str(package / "__init__.py"))
    before = consistency.code_digest()
    (package / "deep" / "code.py").write_text("x = 2")
    assert consistency.code_digest() != before
