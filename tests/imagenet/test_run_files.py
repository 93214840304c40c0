"""What a resumed run takes from the files of the start before it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arsg_dist.engine import JobError, SingleProcessCommunicator
from arsg_dist.imagenet.output.run_directory import read_metrics
from arsg_dist.imagenet.output.run_log import RunLog
from arsg_dist.imagenet.output.weights import BEST, LAST, WeightFiles, read_metadata
from arsg_dist.imagenet.training.checkpoint import RunCheckpoints
from tests.checkpoint.runs import engine, saved_by


def checkpoints(run: Path, *steps: int) -> RunCheckpoints:
    """Checkpoints of three ranks, as a resume on one rank finds them."""
    for step in steps:
        saved_by(run / "checkpoints" / f"step-{step:09d}", 3, engine(seed=step))
    parts: Any = SimpleNamespace(
        communicator=SingleProcessCommunicator(), config=SimpleNamespace(keep_checkpoints=2)
    )
    return RunCheckpoints(parts, run)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_damage_in_any_ranks_shard_is_found_by_fewer_ranks(shard: int, tmp_path: Path) -> None:
    """Catches shards beyond the number of ranks that nobody checks: damage would be found in the middle of loading."""
    made = checkpoints(tmp_path, 1, 2)
    path = tmp_path / "checkpoints" / "step-000000002"
    file = path / f"shard-{shard:05d}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(JobError, match=rf"{file} is damaged.*\n.*--skip_damaged"):
        made._newest(skip_damaged=False)
    saved, notes = made._newest(skip_damaged=True)
    assert saved.where.name == "step-000000001"
    assert [note.startswith(f"skipped {path}: {file} is damaged") for note in notes] == [True]


def test_where_every_checkpoint_is_damaged_all_are_named(tmp_path: Path) -> None:
    """Catches a resume that begins anew, or says nothing of what it skipped."""
    made = checkpoints(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:09d}" / "shard-00001.safetensors").unlink()
    with pytest.raises(JobError) as error:
        made._newest(skip_damaged=True)
    assert [f"step-{step:09d}: " in str(error.value) for step in (1, 2)] == [True, True]
    assert "has no complete checkpoint" in str(error.value)


@pytest.mark.parametrize(("resumed_epoch", "best"), [(1, 4), (2, 2), (3, 2)])
def test_the_best_weights_of_a_resumed_run(resumed_epoch: int, best: int, tmp_path: Path) -> None:
    """Catches a best that is forgotten where a run is resumed right after it, one from epochs that are made again, and
    the last of equals."""
    files = WeightFiles(tmp_path, resumed_epoch=0)
    weights = {"w": torch.zeros(1)}
    for epoch, accuracy in ((1, 0.5), (2, 0.75)):
        files.save(LAST, weights, {"epoch": epoch, "val_top1": accuracy, "weights": "x"})
    files = WeightFiles(tmp_path, resumed_epoch=resumed_epoch)
    for epoch, accuracy in ((3, 0.25), (4, 0.75)):
        files.save(LAST, weights, {"epoch": epoch, "val_top1": accuracy, "weights": "x"})
    assert read_metadata(tmp_path / "weights" / f"{BEST}.safetensors")["epoch"] == best
    assert read_metadata(tmp_path / "weights" / f"{LAST}.safetensors")["epoch"] == 4


def test_records_up_to_the_checkpoint_stay_and_their_clock_goes_on(tmp_path: Path) -> None:
    """Catches the record of the very update that a run is resumed at lost, later ones kept twice, one of an epoch that
    the checkpoint does not count yet, a line that a kill cut off, and wall time that begins anew."""

    start = {"time": "", "command": [], "packages": {}, "device": "", "hosts": 1, "seed": 1, "data": ""}

    def log(resumed_updates: int | None) -> RunLog:
        return RunLog(
            tmp_path,
            {"seed": 1},
            resumed_updates=resumed_updates,
            resumed_epochs=1,
            environment=start,
            classes=["a"],
        )

    first = log(None)
    epoch = {"train_loss": 1.0, "val_loss": 1.0, "val_top1": 0.5, "val_top5": 0.5, "val_images": 4, "lr": 0.1}
    for update in (2, 4, 6):
        first.write("train", update, {"loss": 1.0})
        first.write("epoch", update, {"epoch": update // 2, "images_per_second": 1.0, **epoch})
    metrics = tmp_path / "metrics.jsonl"
    lines = [{**record, "seconds": 100.0 * record["update"]} for record in read_metrics(tmp_path)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    second = log(4)
    second.write("train", 6, {"loss": 2.0})
    records = list(read_metrics(tmp_path))
    assert [(record["kind"], record["update"]) for record in records] == [
        *(("train", 2), ("epoch", 2), ("train", 4), ("train", 6))
    ]
    assert records[-1]["loss"] == 2.0
    assert 400 <= records[-1]["seconds"] < 460
