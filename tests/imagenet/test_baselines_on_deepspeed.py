"""Recipes of ARSG's peers under DeepSpeed: the shipped configs leave the optimizer to the recipe."""

from pathlib import Path

import pytest
import torch

from arsg_dist.deepspeed.build import DeepSpeedBuilder
from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.config import OptimizerConfig, TrainConfig
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.training.engines import prepare
from tests.imagenet.test_features_on_ranks import parameters
from tests.imagenet.test_training import SCRIPT
from tests.support.compare import assert_same_weights
from tests.support.launchers import REPOSITORY, launch

OPTIMIZERS = {
    "SGD": "{lr: 0.01, momentum: 0.9, weight_decay: 0.01}",
    "Adam": "{lr: 0.002, eps: 1.0e-3, weight_decay: 0.01}",
}
CASES = [
    ("SGD", 1),
    pytest.param("Adam", 2, marks=pytest.mark.turn(0)),
    pytest.param("SGD", 3, marks=pytest.mark.turn(1)),
    pytest.param("Adam", 0, marks=pytest.mark.turn(2)),
]


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "stage"), CASES)
def test_two_ranks_train_as_one_process_does(
    name: str, stage: int, recipe: list[str], tmp_path: Path
) -> None:
    """Catches a recipe's optimizer that is refused, is ARSG after all, or is DeepSpeed's Adam (AdamW by default); and
    its state missing in a checkpoint: the second epoch is a run of its own."""
    settings = [*recipe, "--optimizer.type", name, "--optimizer.params", OPTIMIZERS[name]]
    stopped = ["--deepspeed_config", f"configs/deepspeed/zero{stage}.json", "--checkpoint_every", "6"]
    for more in (["--max_updates", "7"], ["--resume"]):
        job = launch("warm deepspeed", 2, SCRIPT, *settings, *stopped, *more)
        assert job.code == 0, job.output[-5000:]
    alone = [*settings, "--accumulation_steps", "2", "--output", str(tmp_path / "alone")]
    assert train_command(alone) == 0
    torch.manual_seed(0)
    start = build_model("resnet20", 3)
    assert_same_weights(
        parameters(tmp_path / "run" / "weights" / "last.safetensors"),
        parameters(tmp_path / "alone" / "weights" / "last.safetensors"),
        started_from={key: parameter.detach() for key, parameter in start.named_parameters()},
        relative=1e-3,  # a sum in another order can turn a ReLU off or on; AdamW differs by 10 % and more
    )


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", ["ARSG", "Adam", "SGD"])
def test_the_shipped_configs_take_any_optimizer(name: str, stage: int) -> None:
    """Catches a config that names an optimizer for the recipe."""
    config = TrainConfig(optimizer=OptimizerConfig(type=name, params={"lr": 0.1}))
    path = str(REPOSITORY / f"configs/deepspeed/zero{stage}.json")
    builder = prepare("deepspeed", config, path, 2)
    assert isinstance(builder, DeepSpeedBuilder)
    assert builder.config["optimizer"] == {"type": name, "params": {"lr": 0.1}}


def test_stage_0_in_half_precision_is_for_arsg() -> None:
    """Catches a baseline that makes an update before it has seen data."""
    path = str(REPOSITORY / "configs/deepspeed/zero0.json")
    config = TrainConfig(precision="bf16", optimizer=OptimizerConfig(type="Adam"))
    with pytest.raises(ValueError, match="Adam does not work with ZeRO stage 0 in bf16"):
        prepare("deepspeed", config, path, 2)
    prepare("deepspeed", TrainConfig(precision="bf16"), path, 2)
