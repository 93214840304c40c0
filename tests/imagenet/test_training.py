"""The command as a user runs it, on one process and on real ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arsg_dist.imagenet.cli import train_command
from tests.support.launchers import Finished, launch

SCRIPT = "launch/train_imagenet.py"
ENGINES = {
    "deepspeed": ("deepspeed", ["--deepspeed_config", "configs/deepspeed/zero1.json"]),
    "horovod": ("mpirun", ["--engine", "horovod"]),
}


def start(engine: str, *arguments: object) -> Finished:
    launcher, options = ENGINES[engine]
    return launch(launcher, 2, SCRIPT, *options, *arguments)


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
    states = [
        torch.load(directory / "checkpoints" / newest.name / "replicated.pt", weights_only=True)
        for directory in (run, tmp_path / "whole")
    ]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name
    for index, state in states[0]["optimizer"]["state"].items():
        assert state.keys() == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        for key, tensor in state.items():
            assert torch.equal(tensor, states[1]["optimizer"]["state"][index][key])
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


@pytest.mark.ranks
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_validate_everything_and_resume_exactly(
    engine: str, recipe: list[str], tmp_path: Path
) -> None:
    """Catches images counted twice or not at all, and shards that are not restored."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    job = start(engine, *recipe, "--epochs", "3", "--output", whole)
    assert job.code == 0, job.output[-5000:]
    assert "validation accuracy" in job.output
    assert "over all 21 images" in job.output
    assert f"outputs in {whole}" in job.output
    job = start(engine, *recipe, "--epochs", "3")
    assert job.code == 0, job.output[-5000:]
    max((run / "checkpoints").iterdir()).rename(tmp_path / "removed")
    job = start(engine, *recipe, "--epochs", "3", "--resume")
    assert job.code == 0, job.output[-5000:]
    assert without_speed(epochs_of(run)) == without_speed(epochs_of(whole))
    assert len(epochs_of(run)) == 3
    assert all(record["val_images"] == 21 for record in epochs_of(run))


@pytest.mark.ranks
def test_checkpoint_of_another_number_of_ranks_is_refused_by_name(recipe: list[str]) -> None:
    """Catches DeepSpeed's traceback, or shards of two ranks read as those of three."""
    engine_options = ENGINES["deepspeed"][1]
    assert start("deepspeed", *recipe, "--epochs", "1").code == 0
    job = launch("deepspeed", 3, SCRIPT, *engine_options, *recipe, "--epochs", "2", "--resume")
    assert job.code != 0
    assert "written by 2 ranks and this job has 3" in job.output
    assert "Traceback" not in job.output


@pytest.mark.slow
@pytest.mark.ranks
def test_digits_are_learned_on_two_ranks(tmp_path: Path) -> None:
    """Catches a default recipe that runs but does not learn."""
    run = tmp_path / "run"
    job = start("deepspeed", "--config", "configs/digits.yaml", "--output", run)
    assert job.code == 0, job.output[-5000:]
    assert epochs_of(run)[-1]["val_top1"] > 0.95
    assert epochs_of(run)[-1]["val_images"] == 355
