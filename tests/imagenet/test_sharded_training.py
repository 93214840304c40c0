"""`--engine horovod-sharded`: the training command with sharded optimizer state, against replicated ranks."""

import shutil
from pathlib import Path

import pytest
import torch

from arsg_dist.checkpoint import SavedRun
from arsg_dist.engine.state import PARAMETER
from tests.support.compare import assert_same_weights
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

SCRIPT = "launch/train_imagenet.py"


def train(engine: str, *arguments: object) -> None:
    job = launch("warm horovodrun", 2, SCRIPT, "--engine", engine, *arguments)
    assert job.code == 0, job.output[-5000:]
    assert "over all 21 images" in job.output


def model_at(checkpoint: Path) -> dict[str, torch.Tensor]:
    saved = SavedRun(checkpoint)
    return {name: saved.whole(PARAMETER, name) for name in saved.parameters}


@pytest.mark.turn(0)
def test_sharded_training_equals_replicated_and_resumes_its_checkpoint(
    recipe: list[str], tmp_path: Path
) -> None:
    """Catches an engine that trains something else, and checkpoints that only the engine that wrote them can read."""
    # Not clipped: without it two ranks' average has one rounding, and the comparison can be strict.
    recipe = [*recipe, "--optimizer.params", '{"lr": 0.01, "mu": 0.1, "eps": 1e-3}']
    train("horovod", *recipe, "--output", tmp_path / "replicated")
    train("horovod-sharded", *recipe, "--output", tmp_path / "sharded")
    run = shutil.copytree(tmp_path / "replicated", tmp_path / "resumed")
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    train("horovod-sharded", *recipe, "--resume", "--output", run)
    first, last = sorted((tmp_path / "replicated" / "checkpoints").glob("step-*"))
    for name in ("sharded", "resumed"):
        assert_same_weights(
            model_at(tmp_path / name / "checkpoints" / last.name),
            model_at(last),
            started_from=model_at(first),
            relative=1e-3,
        )
