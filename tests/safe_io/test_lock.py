"""A directory is one process's at a time, and nobody's once that process has ended in whatever way."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arsg_dist.safe_io import lock
from arsg_dist.safe_io.lock import DirectoryLock, InUseError, StartOfJob


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    monkeypatch.setattr(lock, "PATIENCE_ELSEWHERE", 0.0)


def taken(directory: Path, job: StartOfJob | None = None) -> DirectoryLock:
    made = DirectoryLock(directory, ".lock", job=job)
    while not made.take():
        time.sleep(0.05)
    return made


def test_the_second_is_told_who_has_it_and_gets_it_afterwards(tmp_path: Path) -> None:
    """Catches two jobs in one directory, a refusal that names nobody, and a file or a directory that is left."""
    first = taken(tmp_path / "runs" / "a")
    with pytest.raises(
        InUseError, match=f"process {os.getpid()} on {os.uname().nodename}, since 2.*remove .*/.lock"
    ):
        taken(tmp_path / "runs" / "a")
    first.close()
    assert list(tmp_path.iterdir()) == []
    second = taken(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / "mine").touch()
    second.close()
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["mine"]


def test_one_who_was_killed_keeps_nobody_off(tmp_path: Path) -> None:
    """Catches a lock that is the file itself: after kill -9 the run could never go on."""
    reads, writes = os.pipe()
    process = os.fork()
    if not process:
        held = taken(tmp_path)
        os.write(writes, b"held")
        time.sleep(60)
        os._exit(held is None)
    assert os.read(reads, 4) == b"held"
    with pytest.raises(InUseError, match=f"process {process} on"):
        taken(tmp_path)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(reads)
    os.close(writes)
    assert (tmp_path / ".lock").exists()
    taken(tmp_path).close()
    assert not (tmp_path / ".lock").exists()


def test_a_later_start_of_the_same_batch_job_takes_it_over(tmp_path: Path) -> None:
    """Catches a requeued job that waits for the lock of a host that died, and one that takes another job's, or that of
    a second training of its own start."""
    first = taken(tmp_path, ("Slurm 7", 1))
    for other in (None, ("Slurm 7", 0), ("Slurm 7", 1), ("Slurm 8", 2)):
        with pytest.raises(InUseError, match="job Slurm 7"):
            taken(tmp_path, other)
    second = taken(tmp_path, ("Slurm 7", 2))
    first.close()
    with pytest.raises(InUseError):  # the first one's end has not let go of the second one's
        taken(tmp_path)
    second.close()


def test_one_that_is_let_go_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start right after a kill that is refused, since the killed process is still about to end."""
    monkeypatch.setattr(lock, "PATIENCE", 600.0)
    first, second = taken(tmp_path), DirectoryLock(tmp_path, ".lock")
    assert not second.take()
    assert not second.take()
    first.close()
    assert second.take()
    second.close()


@pytest.mark.parametrize(("host", "patience"), [(socket.gethostname(), 10), ("elsewhere", 120)])
def test_a_lock_of_another_host_is_waited_for_longer(
    host: str, patience: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a requeued job that is refused on another host while the server still counts its old lock."""
    now = 1000.0
    monkeypatch.setattr(lock, "PATIENCE", 10.0)
    monkeypatch.setattr(lock, "PATIENCE_ELSEWHERE", 120.0)
    first = taken(tmp_path)
    signed = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(signed | {"host": host}))
    monkeypatch.setattr(lock, "time", SimpleNamespace(monotonic=lambda: now))
    second = DirectoryLock(tmp_path, ".lock")
    assert not second.take()
    now += patience - 1
    assert not second.take()
    now += 2
    with pytest.raises(InUseError, match=f"on {host}"):
        second.take()
    first.close()


def test_what_was_signed_before_is_gone(tmp_path: Path) -> None:
    """Catches a record with the end of a longer one behind it, which names nobody."""
    (tmp_path / ".lock").write_text("x" * 900)
    held = taken(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    held.close()


def test_directories_that_a_first_try_made_are_removed_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an empty directory that is left where another process had the lock for a moment."""
    held = DirectoryLock(tmp_path / "runs" / "a", ".lock")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", raising(BlockingIOError()))
        patch.setattr(lock, "PATIENCE", 600.0)
        assert not held.take()
    assert held.take()
    held.close()
    assert not (tmp_path / "runs").exists()


def test_it_is_never_two_processes_own(tmp_path: Path) -> None:
    """Catches the race for a file that the one who lets go removes: a lock on a file without a name excludes nobody."""
    inside, most, errors = 0, 0, []

    def work() -> None:
        nonlocal inside, most
        for _ in range(60):
            try:
                held = taken(tmp_path / "run")
            except InUseError:
                continue
            except Exception as error:
                errors.append(error)
                return
            inside += 1
            most = max(most, inside)
            time.sleep(0)
            inside -= 1
            held.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert most == 1
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_file_that_was_removed_meanwhile_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a lock on the file that the job before has just removed: the next job makes another, and both train."""
    opened, open_lock = [], lock.open_lock

    def open_as_it_is_removed(path: Path) -> int:
        opened.append(open_lock(path))
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(lock, "open_lock", open_as_it_is_removed)
    first = taken(tmp_path)
    with pytest.raises(InUseError):
        taken(tmp_path)
    first.close()


def test_a_link_at_its_name_is_not_followed(tmp_path: Path) -> None:
    """Catches a lock's file that is written through somebody's link."""
    (tmp_path / "theirs").write_text("mine")
    (tmp_path / ".lock").symlink_to("theirs")
    with pytest.raises(ValueError, match="is a link"):
        taken(tmp_path)
    assert (tmp_path / "theirs").read_text() == "mine"


def test_what_somebody_wrote_into_it_is_only_shown(tmp_path: Path) -> None:
    """Catches a traceback, or a terminal that is steered, by a file that is no record of ours."""
    for text in ("", "[]", '{"pid": "\\u001b[2J", "host": 1, "since": []}', "x" * 5000):
        with (tmp_path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(text)
            file.flush()
            with pytest.raises(InUseError, match="is in use by") as refused:
                taken(tmp_path)
            assert "\x1b" not in str(refused.value)


def raising(error: OSError) -> Callable[..., None]:
    def fails(*_: Any) -> None:
        raise error

    return fails


@pytest.mark.parametrize(("function", "number"), [("open_lock", errno.EROFS), ("flock", errno.ENOLCK)])
def test_where_there_are_no_locks_nobody_is_held_off(
    function: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that cannot be started on a file system without locks, or be looked at on one that is read-only."""
    error = OSError(number, "no")
    monkeypatch.setattr(lock if function == "open_lock" else fcntl, function, raising(error))
    held = taken(tmp_path)
    taken(tmp_path).close()
    held.close()
    assert list(tmp_path.iterdir()) == []
