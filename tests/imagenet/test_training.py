"""The command as a user runs it, on one process and on real ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from arsg_dist.checkpoint import SavedRun
from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.training.checkpoint import RunCheckpoints
from tests.support import engines
from tests.support.launchers import Finished, launch

SCRIPT = "launch/train_imagenet.py"
ENGINES = ("deepspeed", "horovod")
REAL_LAUNCHERS = {"deepspeed": "deepspeed", "horovod": "mpirun"}


def start(engine: str, *arguments: object) -> Finished:
    started = engines.ENGINES[engine]
    return launch(started.warm, 2, SCRIPT, *started.options, *arguments)


def epochs_of(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "epoch"]


TIMED = {"images_per_second", "images_per_second_per_rank", "data_wait_share", "seconds"}


def without_speed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


def test_a_run_leaves_what_it_promises_and_resumes_exactly(recipe: list[str], tmp_path: Path) -> None:
    """Catches state missing from a checkpoint: the resumed run must equal the uninterrupted one bit for bit."""
    assert train_command([*recipe, "--epochs", "3", "--output", str(tmp_path / "whole")]) == 0
    # Interrupted after two of three epochs: with the checkpoint of the third and its records gone.
    assert train_command([*recipe, "--epochs", "3"]) == 0
    run = tmp_path / "run"
    newest = max((run / "checkpoints").iterdir())
    newest.rename(tmp_path / "removed")
    assert train_command([*recipe, "--epochs", "3", "--resume"]) == 0
    assert without_speed(epochs_of(run)) == without_speed(epochs_of(tmp_path / "whole"))
    resumed, never_stopped = (
        SavedRun(directory / "checkpoints" / newest.name).manifest for directory in (run, tmp_path / "whole")
    )
    assert resumed.tensors == never_stopped.tensors  # with the digests of all values
    assert resumed.groups == never_stopped.groups
    assert {key.split(":")[0] for key in resumed.tensors} == {
        *("parameter", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "buffer", "extra")
    }
    assert (run / "learning_curve.png").stat().st_size > 10_000
    assert list((run / "tensorboard").glob("events*"))
    assert epochs_of(run)[0]["val_images"] == 21


def test_settings_changed_at_a_resume_are_said(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run whose config.yaml no longer says how it was trained."""
    assert train_command([*recipe, "--epochs", "1", "--schedule.warmup_epochs", "0"]) == 0
    assert train_command([*recipe, "--epochs", "2", "--schedule.warmup_epochs", "0", "--resume"]) == 0
    assert "settings changed since the run was started: epochs: 1 → 2\n" in capsys.readouterr().out
    assert "epochs: 2\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_synthetic_images_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a source of images that only its own test can read."""
    data = ["--data.source", "synthetic", "--data.synthetic_images", "10", "--data.synthetic_classes", "3"]
    small = ["--model", "resnet20", "--data.image_size", "16", "--data.workers", "1", "--batch_size", "5"]
    run = ["--optimizer.params", "{lr: 0.01}", "--epochs", "1", "--output", str(tmp_path / "run")]
    assert train_command([*data, *small, *run]) == 0
    assert "resnet20 on synthetic images" in capsys.readouterr().out
    (epoch,) = epochs_of(tmp_path / "run")
    assert (epoch["update"], epoch["val_images"], epoch["bad_images"]) == (2, 10, 0)


@pytest.mark.parametrize(
    "updates", ["2", pytest.param("5", marks=pytest.mark.turn(0))]
)  # in the first epoch, and at its end
def test_a_resume_with_nothing_left_to_do_is_not_a_finished_run(
    updates: str, recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches `--max_updates N --resume` given twice that ends in a traceback for want of weights to describe, or calls
    a run done that has epochs left."""
    stopped = [*recipe, "--checkpoint_every", "2", "--max_updates", updates]
    assert train_command(stopped) == 0
    assert train_command([*stopped, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "already done" not in shown
    assert f"ended after {updates} updates" in shown
    assert (tmp_path / "run" / "weights" / "README.md").exists() == (updates == "5")
    assert train_command([*recipe, "--resume"]) == 0
    assert "already done" not in capsys.readouterr().out
    assert train_command([*recipe, "--resume"]) == 0
    assert "already done" in capsys.readouterr().out


def test_a_resume_keeps_seed_and_batch_size(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches images of the epoch under way that are seen twice or never, and a schedule that begins to rise again."""
    assert train_command([*recipe, "--checkpoint_every", "2", "--max_updates", "2"]) == 0
    for name, before, now in (("seed", 0, 1), ("batch_size", 12, 24)):
        assert train_command([*recipe, "--resume", f"--{name}", str(now)]) == 2
        error = capsys.readouterr().err
        assert f"this run was made with {name}={before}, not {now}" in error
        assert f"resume with --{name} {before}" in error
    assert train_command([*recipe, "--resume", "--accumulation_steps", "2"]) == 0


def test_a_checkpoint_that_does_not_say_its_seed_is_resumed(
    recipe: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches checkpoints of an earlier version that end in a traceback."""
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "_fixed", lambda self: {})
        assert train_command([*recipe, "--checkpoint_every", "2", "--max_updates", "2"]) == 0
    assert train_command([*recipe, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "does not say with which seed it was made: it must be 0" in shown
    assert "does not say with which batch_size it was made: it must be 12" in shown


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=pytest.mark.turn(2 if name == "deepspeed" else 0)) for name in ENGINES],
)
def test_two_ranks_under_a_real_launcher_validate_everything(
    engine: str, recipe: list[str], tmp_path: Path
) -> None:
    """Catches a program that does not come up under the launcher, and images counted twice or not at all."""
    options = engines.ENGINES[engine].options
    job = launch(REAL_LAUNCHERS[engine], 2, SCRIPT, *options, *recipe)
    assert job.code == 0, job.output[-5000:]
    assert "validation accuracy" in job.output
    assert "over all 21 images" in job.output
    assert f"outputs in {tmp_path / 'run'}" in job.output
    assert [record["val_images"] for record in epochs_of(tmp_path / "run")] == [21, 21]


@pytest.mark.turn(1)
@pytest.mark.ranks
def test_a_run_goes_on_with_another_engine_and_number_of_ranks(recipe: list[str], tmp_path: Path) -> None:
    """Catches a run that is tied to its first engine, and schedules or an average that start again on the way."""
    options = [*recipe, "--epochs", "4", "--ema_decay", "0.9", "--async_save", "true"]
    assert start("deepspeed", *options, "--output", tmp_path / "whole").code == 0
    job = start("deepspeed", *options, "--max_updates", "5")
    assert job.code == 0, job.output[-5000:]
    job = launch(
        *("warm horovodrun", 3, SCRIPT, "--engine", "horovod-sharded"),
        *(*options, "--max_updates", "10", "--resume"),
    )
    assert job.code == 0, job.output[-5000:]
    assert "saved by the engine deepspeed, going on with horovod-sharded" in job.output
    assert "on another number of ranks than 2" in job.output
    assert train_command([*options, "--resume", "--max_updates", "15"]) == 0
    job = start("deepspeed", *options, "--resume")
    assert job.code == 0, job.output[-5000:]
    moved, whole = epochs_of(tmp_path / "run"), epochs_of(tmp_path / "whole")
    assert [record["lr"] for record in moved] == [record["lr"] for record in whole]
    # Batch norm sees batches of other sizes on other numbers of ranks: only the first epoch can be equal.
    assert moved[0]["train_loss"] == whole[0]["train_loss"]
    assert moved[-1]["train_loss"] < moved[0]["train_loss"] / 2


@pytest.mark.turn(4, of=12)
@pytest.mark.ranks
def test_digits_are_learned_on_two_ranks(tmp_path: Path) -> None:
    """Catches a default recipe that runs but does not learn."""
    run = tmp_path / "run"
    job = start("deepspeed", "--config", "configs/digits.yaml", "--output", run)
    assert job.code == 0, job.output[-5000:]
    assert epochs_of(run)[-1]["val_top1"] > 0.95
    assert epochs_of(run)[-1]["val_images"] == 355
