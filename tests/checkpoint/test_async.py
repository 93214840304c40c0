"""Saving while training goes on."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from arsg_dist.checkpoint import CheckpointStore, SavedRun, memory, prepare_save, save_run
from arsg_dist.checkpoint.memory import Memory
from arsg_dist.engine import Communicator, JobError, SingleProcessCommunicator
from arsg_dist.engine.state import Piece
from tests.checkpoint.runs import engine


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights or progress that training changes while they are written, and a checkpoint that is seen half
    written."""
    may_write, communicator, made = threading.Event(), SingleProcessCommunicator(), engine()
    store = CheckpointStore(tmp_path, communicator)
    from arsg_dist.checkpoint import writer

    real = writer.write_part

    def late(*arguments: object) -> None:
        assert may_write.wait(120)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "write_part", late)
    before = {name: tensor.clone() for name, tensor in made.module.state_dict().items()}
    progress = {"epoch": 1, "best": [0.5]}
    path = save_run(store, 1, made.state(), progress, communicator, wait=False)
    made.backward(made.module(torch.randn(5, 3)))
    made.step()
    progress["epoch"] = 2
    progress["best"].append(0.75)  # type: ignore[attr-defined]
    assert store.latest() is None
    may_write.set()
    store.finish()
    assert store.latest() == path
    assert SavedRun(path).progress == {"epoch": 1, "best": [0.5]}
    other = engine(seed=1)
    other.load_state(SavedRun(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.module.state_dict().items())
    assert not torch.equal(made.module.state_dict()["first.bias"], before["first.bias"])


def test_the_next_save_waits_for_the_last_before_it_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a copy for the second checkpoint in the memory from which the first is still being written."""
    from arsg_dist.checkpoint import writer

    may_write, communicator, made = threading.Event(), SingleProcessCommunicator(), engine()
    store = CheckpointStore(tmp_path, communicator)
    write_part, finish = writer.write_part, store.finish

    def late(*arguments: object) -> None:
        assert may_write.wait(120)
        write_part(*arguments)  # type: ignore[arg-type]

    def released() -> None:
        may_write.set()
        finish()

    monkeypatch.setattr(writer, "write_part", late)
    before = {name: tensor.clone() for name, tensor in made.module.state_dict().items()}
    first = save_run(store, 1, made.state(), {}, communicator, wait=False)
    made.backward(made.module(torch.randn(5, 3)))
    made.step()
    monkeypatch.setattr(store, "finish", released)
    save_run(store, 2, made.state(), {}, communicator, wait=False)
    store.finish()
    other = engine(seed=1)
    other.load_state(SavedRun(first))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.module.state_dict().items())


def test_an_error_of_the_thread_comes_out_at_the_next_save(tmp_path: Path) -> None:
    """Catches a full disk that nobody hears of until the resume."""
    store = CheckpointStore(tmp_path, SingleProcessCommunicator())

    def disk_full(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    store.save(1, disk_full, wait=False)
    with pytest.raises(JobError, match="No space left"):
        store.save(2, lambda directory: None)
    store.finish()
    assert store.complete() == []
    store.save(3, lambda directory: None, wait=False)
    store.save(4, lambda directory: None, wait=False)
    store.finish()
    assert [path.name for path in store.complete()] == ["step-000000003", "step-000000004"]


def test_a_second_try_does_not_write_into_what_the_first_left(tmp_path: Path) -> None:
    """Catches files of a save that failed in the checkpoint of the same update that is saved after it."""
    store = CheckpointStore(tmp_path, SingleProcessCommunicator())

    def disk_full(directory: Path) -> None:
        (directory / "half").write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(JobError, match="No space left"):
        store.save(1, disk_full)
    path = store.save(1, lambda directory: (directory / "whole").write_text("whole") and None)
    assert [file.name for file in path.iterdir()] == ["whole"]


def test_the_training_touches_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a directory that the training makes, looks through or clears, and waits for where the disk is slow."""
    directory, touched = tmp_path / "checkpoints", list[str]()

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is threading.main_thread() and str(directory) in str(arguments):
                touched.append(f"{name} {arguments}")
            return real(*arguments, **options)

        return call

    store, made = CheckpointStore(directory, SingleProcessCommunicator(), keep=1), engine()
    for step in (1, 2):  # the second has something to look through
        with monkeypatch.context() as patches:
            for name in ("mkdir", "open", "listdir", "scandir", "stat", "lstat", "rename", "unlink", "rmdir"):
                patches.setattr(os, name, watched(name, getattr(os, name)))
            path = save_run(store, step, made.state(), {}, SingleProcessCommunicator(), wait=False)
        store.finish()
        assert touched == []
    assert store.latest() == path
    other = engine(seed=1)
    other.load_state(SavedRun(path))
    assert torch.equal(other.module.state_dict()["first.bias"], made.module.state_dict()["first.bias"])


def test_the_first_save_copies_into_memory_that_was_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches memory that is prepared and not used: a first save would stop the training several times as long."""
    store, made = CheckpointStore(tmp_path, SingleProcessCommunicator()), engine()
    prepare_save(store, made.state())
    real, allocated = memory._allocate, list[int]()

    def counted(numel: int, *arguments: Any) -> torch.Tensor:
        allocated.append(numel)
        return real(numel, *arguments)

    store.memory._wait()
    monkeypatch.setattr(memory, "_allocate", counted)
    path = save_run(store, 1, made.state(), {}, SingleProcessCommunicator(), wait=False)
    store.finish()
    assert allocated == []
    other = engine(seed=1)
    other.load_state(SavedRun(path))
    for name, tensor in made.module.state_dict().items():
        assert torch.equal(other.module.state_dict()[name], tensor), name


def test_memory_of_one_size_is_not_taken_for_another() -> None:
    """Catches a copy into the kept memory of a tensor that had another size or dtype, and one of pieces mixed up."""
    kept, values = Memory(), torch.arange(6.0)
    kept.prepare([Piece("a", 0, 2, torch.zeros(6)), Piece("a", 2, 4, torch.zeros(6), 2)])
    kept._wait()
    prepared = {tensor.data_ptr() for tensor in kept._kept.values()}
    first = kept.copy([Piece("a", 0, 2, values), Piece("a", 2, 4, values, 2)])
    assert {copy.source.data_ptr() for copy in first} == prepared
    assert [copy.values().tolist() for copy in first] == [[0, 1], [2, 3, 4, 5]]
    assert kept.copy([Piece("a", 0, 3, values, 3)])[0].values().tolist() == [3, 4, 5]
    whole = kept.copy([Piece("a", 0, 3, torch.tensor([1, 1 << 40, 3]))])[0].values()
    assert (whole.dtype, whole.tolist()) == (torch.int64, [1, 1 << 40, 3])


def test_a_rank_killed_while_it_writes_leaves_nothing_that_is_seen_or_stays(tmp_path: Path) -> None:
    """Catches half a checkpoint that a resume takes, or that the next job writes into or leaves for ever."""
    CheckpointStore(tmp_path, SingleProcessCommunicator()).save(1, lambda path: None)

    def half(directory: Path) -> None:
        (directory / "half").write_text("ha")
        time.sleep(60)

    child = os.fork()
    if child == 0:
        store = CheckpointStore(tmp_path, SingleProcessCommunicator())
        store.save(2, half, wait=False)
        store.finish()
        os._exit(0)
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob(".step-000000002.*/half")):
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    store = CheckpointStore(tmp_path, SingleProcessCommunicator())
    assert [path.name for path in store.complete()] == ["step-000000001"]
    store.save(2, lambda directory: (directory / "whole").write_text("whole") and None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]
    assert [path.name for path in (tmp_path / "step-000000002").iterdir()] == ["whole"]


T = TypeVar("T")


class Threads(Communicator):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, values: list[Any], meeting: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(values)
        self._values, self._meeting = values, meeting

    def all_gather_object(self, value: T) -> list[T]:
        self._values[self.rank] = value
        self._meeting.wait(120)
        gathered = list(self._values)
        self._meeting.wait(120)
        return gathered

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def test_ranks_that_do_not_wait_for_each_other_write_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the first rank's clearing up that takes a faster one's part with it, and a directory for each rank."""
    values, meeting, written = [None, None], threading.Barrier(2), threading.Event()
    stores = [CheckpointStore(tmp_path, Threads(rank, values, meeting)) for rank in range(2)]
    (tmp_path / ".step-000000001.0123456789abcdef.partial").mkdir()
    real = stores[0].check

    def late() -> None:
        assert written.wait(120)
        real()

    monkeypatch.setattr(stores[0], "check", late)

    def train(rank: int, text: str) -> Path:
        def write(directory: Path) -> None:
            (directory / f"part-{rank}").write_text(text)
            if rank == 1:
                written.set()

        path = stores[rank].save(1, write, wait=False)
        stores[rank].finish()
        return path

    with ThreadPoolExecutor(2) as ranks:
        for text in ("first", "second"):
            written.clear()
            path, same = ranks.map(train, range(2), [text] * 2)
            assert path == same
            assert {file.name: file.read_text() for file in path.iterdir()} == {
                "part-0": text,
                "part-1": text,
            }
    assert [found.name for found in tmp_path.iterdir()] == ["step-000000001"]
