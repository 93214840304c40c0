from pathlib import Path

import pytest

from arsg_dist.checkpoint import CheckpointStore
from arsg_dist.engine import JobError, SingleProcessCommunicator


def store(directory: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(directory / "checkpoints", SingleProcessCommunicator(), keep=keep)


def write(text: str):  # type: ignore[no-untyped-def]
    return lambda directory: (directory / "state").write_text(text) and None


def test_the_newest_complete_one_is_found_by_number(tmp_path: Path) -> None:
    """Catches an order by name, in which step 10**10 comes before 2 * 10**9."""
    for step in (2, 30, 2 * 10**9, 10**10):
        store(tmp_path).save(step, write(str(step)))
    assert [path.name for path in store(tmp_path).complete()] == ["step-2000000000", "step-10000000000"]
    latest = store(tmp_path).latest()
    assert latest
    assert (latest / "state").read_text() == "10000000000"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2, "old or partial ones were left behind"


def test_a_failed_write_leaves_the_old_ones_and_is_not_seen(tmp_path: Path) -> None:
    """Catches a half-written checkpoint that a resume would load, and a full disk that costs the previous one."""
    store(tmp_path).save(1, write("good"))

    def disk_full(directory: Path) -> None:
        (directory / "state").write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(JobError, match="No space left"):
        store(tmp_path, keep=1).save(2, disk_full)
    latest = store(tmp_path).latest()
    assert latest is not None
    assert (latest.name, (latest / "state").read_text()) == ("step-000000001", "good")
    store(tmp_path).save(2, write("retried"))
    latest = store(tmp_path).latest()
    assert latest
    assert [path.name for path in latest.iterdir()] == ["state"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    """Catches a rename onto a directory that is not empty."""
    store(tmp_path).save(1, write("first"))
    store(tmp_path).save(1, write("second"))
    latest = store(tmp_path).latest()
    assert latest
    assert (latest / "state").read_text() == "second"


def test_an_empty_store_has_no_latest(tmp_path: Path) -> None:
    """Catches a traceback where a run was interrupted before its first checkpoint."""
    assert store(tmp_path).latest() is None
    with pytest.raises(ValueError, match="at least 1"):
        store(tmp_path, keep=0)
