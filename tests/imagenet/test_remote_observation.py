"""A recipe with RemoteObservation around AdamW, begun in one process and gone on with under every engine."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arsg_dist.imagenet import models
from arsg_dist.imagenet.cli import train_command
from tests.imagenet.jobs.small_network import SmallResNet
from tests.imagenet.test_training import epochs_of
from tests.support.compare import assert_same_weights
from tests.support.launchers import launch

JOB = "tests/imagenet/jobs/imagenet_job.py"
ENGINES = [
    pytest.param("warm torchrun", ["--engine", "ddp"], marks=pytest.mark.turn(1)),
    pytest.param("warm torchrun", ["--engine", "fsdp"], marks=pytest.mark.turn(0)),
    pytest.param("warm horovodrun", ["--engine", "horovod"], marks=pytest.mark.turn(2)),
    ("warm horovodrun", ["--engine", "horovod-sharded"]),
    ("warm deepspeed", ["--deepspeed_config", "configs/deepspeed/zero2.json"]),
    pytest.param(
        "warm deepspeed", ["--deepspeed_config", "configs/deepspeed/zero3.json"], marks=pytest.mark.turn(1)
    ),
]
INNER = "inner: AdamW, lr: 0.004, betas: [0.0, 0.95], eps: 1.0e-3, weight_decay: 0.05"
OPTIMIZER = f"{{{INNER}, remote_mu: 0.2, remote_beta1: 0.9}}"


@pytest.mark.ranks
@pytest.mark.parametrize(("launcher", "engine"), ENGINES)
def test_a_run_begun_in_one_process_ends_on_ranks_as_it_would_have(
    launcher: str, engine: list[str], recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a recipe's RemoteObservation that an engine builds with other settings or groups, a boost of its μ that
    is lost, a movement missing in the run's checkpoint, and an evaluation at x in the place of θ."""
    settings = [
        *(*recipe, "--optimizer.type", "RemoteObservation", "--optimizer.params", OPTIMIZER),
        *("--optimizer.decay_norm_and_bias", "false", "--evaluate_at", "theta", "--boost.milestones", "[1]"),
    ]
    alone = [*settings, "--accumulation_steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(models, "ResNet20", SmallResNet)
        assert train_command([*alone, "--checkpoint_every", "7", "--max_updates", "7"]) == 0
        shutil.copytree(tmp_path / "run", tmp_path / "alone", symlinks=True)
        assert train_command([*alone, "--resume", "--output", str(tmp_path / "alone")]) == 0
        torch.manual_seed(0)
        start = SmallResNet(3)
    small = {"ARSG_TEST_SMALL_NETWORK": "1"}
    job = launch(launcher, 2, JOB, *engine, *settings, "--resume", variables=small)
    assert job.code == 0, job.output[-5000:]
    began = {key: parameter.detach() for key, parameter in start.named_parameters()}
    ended, expected = (load_file(tmp_path / run / "weights" / "last.safetensors") for run in ("run", "alone"))
    assert_same_weights(
        {key: ended[key] for key in began},
        {key: expected[key] for key in began},
        started_from=began,
        relative=2e-3,  # a sum in another order can turn a ReLU off or on
    )
    assert [record["mu"] for record in epochs_of(tmp_path / "run")] == [0.2, 0.4]
