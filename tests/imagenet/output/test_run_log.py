"""Records of a run: kept through full disks and kills, and in Weights & Biases."""

import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arsg_dist.imagenet.cli import train_command
from arsg_dist.safe_io import files
from arsg_dist.safe_io.files import write_text

RECORDS = ("metrics.jsonl", "environment.yaml", "classes.txt", "config.yaml")


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 20 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    """Catches a file that is emptied before its new content is on the disk."""
    path = tmp_path / "config.yaml"
    write_text(path, "seed: 1\n")
    with full_disk(), pytest.raises(OSError, match=f"cannot write {path}"):
        write_text(path, "seed: 2\n" * 10)
    assert path.read_text() == "seed: 1\n"
    write_text(path, "seed: 3\n")
    assert path.read_text() == "seed: 3\n"
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        *(pytest.param(name, marks=pytest.mark.turn(turn)) for turn, name in enumerate(RECORDS[1:])),
    ],
)
def test_a_resume_that_cannot_write_its_records_loses_none(
    name: str,
    recipe: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches records of a run that are emptied and then rewritten: on a full disk they were lost, and with config.yaml
    the run could not be resumed."""
    run = tmp_path / "run"
    assert train_command([*recipe, "--checkpoint_every", "2", "--max_updates", "2"]) == 0
    before = {record: (run / record).read_text() for record in RECORDS}
    assert all(before.values())

    def full(path: Path) -> None:
        if path.name.startswith(f".{Path(name).stem}.") and path.suffix == Path(name).suffix:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        assert train_command([*recipe, "--epochs", "3", "--resume"]) == 2
    assert f"cannot write {run / name}" in capsys.readouterr().err
    assert (run / name).read_text() == before[name]
    assert (run / "metrics.jsonl").read_text() == before["metrics.jsonl"]
    assert train_command([*recipe, "--epochs", "3", "--resume"]) == 0
    assert "epochs: 3\n" in (run / "config.yaml").read_text()


class FakeWandb:
    """Stands in for the package: what each start of a run gave it."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> "FakeWandb":
        self.starts.append(options)
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.turn(1)
def test_weights_and_biases_gets_every_record_and_one_run_each(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches records or settings that do not arrive, a resumed run that becomes a second one there, and a new run that
    continues an old one which lay in the same directory."""
    wandb, run = FakeWandb(), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logged = [*recipe, "--wandb_project", "digits"]
    assert train_command([*logged, "--checkpoint_every", "2", "--max_updates", "2"]) == 0
    assert train_command([*logged, "--resume"]) == 0
    first, resumed = wandb.starts
    assert (first["project"], first["name"], first["resume"]) == ("digits", "run", "allow")
    assert first["config"]["batch_size"] == 12
    assert first["id"] == resumed["id"]
    assert wandb.finished == 2
    assert [step for step, values in wandb.logged if "epoch/val_top1" in values] == [5, 10]
    assert {"train/loss", "train/lr", "train/mu", "train/images_per_second"} <= wandb.logged[0][1].keys()
    shutil.rmtree(run)
    assert train_command([*logged, "--epochs", "1"]) == 0
    assert wandb.starts[-1]["id"] != first["id"]


def test_a_run_without_the_package_wandb_is_refused_before_it_begins(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a setting that is ignored, or that fails when the run's directory is there already."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train_command([*recipe, "--wandb_project", "digits"]) == 2
    assert "wandb_project needs the package wandb: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
