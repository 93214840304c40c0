import os
import re
import shutil
import threading
from pathlib import Path

import pytest

from arsg_dist.checkpoint import CheckpointStore
from arsg_dist.checkpoint import store as store_module
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


def test_the_best_one_is_kept_besides_the_last_and_found_again(tmp_path: Path) -> None:
    """Catches a best checkpoint that ages away, that a new process forgets, or that one without a score replaces."""
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.9), (5, 0.1), (6, None)):
        store(tmp_path).save(step, write(str(step)), score=score)
    names = [path.name for path in store(tmp_path).complete()]
    assert names == ["step-000000002", "step-000000005", "step-000000006"]
    assert (tmp_path / "checkpoints" / "best" / "state").read_text() == "2"
    store(tmp_path).save(7, write("7"), score=0.95)
    assert (tmp_path / "checkpoints" / "best" / "state").read_text() == "7"
    assert [path.name for path in store(tmp_path).complete()] == ["step-000000006", "step-000000007"]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_refused_before_anything_is_written(
    score: float, tmp_path: Path
) -> None:
    """Catches the accuracy of a diverged run, which no later checkpoint is better than, and which no reader takes."""
    store(tmp_path).save(1, write("1"), score=0.5)
    with pytest.raises(JobError, match=f"the score of a checkpoint is {score}"):
        store(tmp_path).save(2, write("2"), score=score)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "step-000000001"]


def test_a_checkpoint_is_concluded_when_every_rank_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint in place with rank 0's part alone, while another rank still writes."""

    class OneOfTwo(SingleProcessCommunicator):
        def __init__(self, rank: int) -> None:
            self.rank, self.world_size = rank, 2

    looked, found = threading.Event(), list[list[str]]()
    look = store_module._Saving._seen

    def seen(saving: store_module._Saving) -> bool:
        everything = look(saving)
        if not everything:
            looked.set()
        return everything

    def write_second(directory: Path) -> None:
        assert looked.wait(120)
        write("second")(directory)

    monkeypatch.setattr(store_module._Saving, "_seen", seen)
    first, second = (CheckpointStore(tmp_path, OneOfTwo(rank)) for rank in (0, 1))
    path = first.save(
        1,
        lambda directory: None,
        lambda directory: found.append(sorted(file.name for file in directory.iterdir())),
        wait=False,
    )
    second._prefix = first._prefix  # the ranks would agree on it
    second.save(1, write_second, wait=False)
    saving = first._saving
    assert saving is not None
    saving._thread.join(120)
    assert found == [[".written-00000", ".written-00001", "state"]]
    assert [file.name for file in path.iterdir()] == ["state"]


def test_what_a_killed_job_left_is_not_seen_and_goes(tmp_path: Path) -> None:
    """Catches half a checkpoint, or one half removed, that looks complete or fills the disk for ever."""
    store(tmp_path).save(1, write("good"))
    earlier = ".step-000000002.partial"  # of versions before 0.19
    for left in (earlier, ".step-000000003.0123456789abcdef.partial", ".step-000000000.removed"):
        (tmp_path / "checkpoints" / left).mkdir()
        (tmp_path / "checkpoints" / left / "state").write_text("half")
    assert [path.name for path in store(tmp_path).complete()] == ["step-000000001"]
    store(tmp_path).save(3, write("next"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000001",
        "step-000000003",
    ]


def test_a_copy_that_followed_the_link_to_the_best_can_be_continued(tmp_path: Path) -> None:
    """Catches a run that, copied to another disk, can be resumed but never saved again."""
    store(tmp_path).save(1, write("1"), score=0.5)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy" / "checkpoints")
    assert not (tmp_path / "copy" / "checkpoints" / "best").is_symlink()
    store(tmp_path / "copy").save(2, write("2"), score=0.9)
    assert (tmp_path / "copy" / "checkpoints" / "best" / "state").read_text() == "2"


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_its_name_soon_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a checkpoint that a power failure leaves with its name and without its content, or without its name."""
    events: list[tuple[str, Path]] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append(("rename", Path(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    path = store(tmp_path).save(
        1, write("written"), lambda directory: (directory / "manifest.json").touch(), score=0.5
    )
    at = events.index(("rename", path))
    partial = events[at - 1][1]
    before = [place for what, place in events[:at] if what == "sync"]
    assert {partial / "state", partial / "manifest.json", partial / "score.json"} <= set(before)
    assert re.fullmatch(r"\.step-000000001\.[0-9a-f]{16}\.partial", partial.name)
    assert partial.parent == path.parent
    assert events[at + 1] == ("sync", path.parent)
