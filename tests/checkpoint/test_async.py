"""Saving while training goes on."""

import threading
from pathlib import Path

import pytest
import torch

from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import JobError, SingleProcessCommunicator
from tests.checkpoint.runs import engine


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights or progress that training changes while they are written, and a checkpoint that is seen half
    written."""
    may_write, communicator, made = threading.Event(), SingleProcessCommunicator(), engine()
    store = CheckpointStore(tmp_path, communicator)
    from arsg_dist.checkpoint import writer

    real = writer.write_part

    def late(*arguments: object) -> None:
        assert may_write.wait(30)
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
        assert may_write.wait(30)
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
