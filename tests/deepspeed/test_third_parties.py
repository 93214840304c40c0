"""Programs that are not ours train ARSG through DeepSpeed, and end where one process ends."""

from typing import Any

import pytest
import torch
from torch import Tensor

import arsg_dist.imagenet.torchvision_compat  # noqa: F401  (transformers imports torchvision)
from tests.deepspeed import third_parties as problem
from tests.deepspeed.jobs.common import weights_of
from tests.support.compare import assert_same_weights
from tests.support.results import results_of

pytestmark = [pytest.mark.ranks, pytest.mark.turn(2)]


def result(name: str) -> Any:
    return results_of("warm deepspeed", 2, "deepspeed/jobs/third_parties")[name]


def loss_of_gpt2(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=problem.tokens(), labels=problem.tokens()).loss
    return loss


SCHEDULES = {2: problem.linear_decay, 3: problem.warmup_and_decay}


@pytest.mark.parametrize("stage", [2, 3])
def test_hugging_faces_trainer_trains_as_one_process(stage: int) -> None:
    """Catches "auto" filled in wrongly, a schedule of the Trainer's or DeepSpeed's that goes astray, accumulation or
    clipping counted twice."""
    model = problem.build_gpt2()
    start = weights_of(model)
    expected = problem.weights_of_one_process(
        model, loss_of_gpt2, schedule=SCHEDULES[stage], clip=problem.CLIP
    )
    assert_same_weights(result(f"Trainer, zero{stage}")["weights"], expected, started_from=start)


@pytest.mark.parametrize("stage", [2, 3])
def test_hugging_faces_trainer_resumes(stage: int) -> None:
    """Catches a checkpoint of the Trainer without ARSG's state or schedule."""
    found = result(f"Trainer, zero{stage}")
    assert found["losses, resumed"] == found["losses"]
    assert found["settings, resumed"] == found["settings"]
    for name, weight in found["weights"].items():
        assert torch.equal(weight, found["weights, resumed"][name]), name


@pytest.mark.parametrize("stage", [2, 3])
def test_settings_that_the_trainer_does_not_know_stay(stage: int) -> None:
    """Catches betas of Adam taking the place of ARSG's where the config leaves them out."""
    settings = result(f"Trainer, zero{stage}")["settings"]
    assert settings["mu"] == problem.MU
    assert tuple(settings["betas"]) == (0.999, 0.99)
    assert settings["eps"] == problem.EPS
    assert settings["weight_decay"] == problem.WEIGHT_DECAY


@pytest.mark.parametrize("name", ["accelerate, zero1", "accelerate, zero3", "accelerate, own optimizer"])
def test_accelerate_trains_as_one_process(name: str) -> None:
    """Catches a dummy optimizer whose settings do not arrive, and an ARSG that accelerate replaces."""
    model = problem.build_gpt2()
    start = weights_of(model)
    expected = problem.weights_of_one_process(model, loss_of_gpt2)
    assert_same_weights(result(name), expected, started_from=start)


@pytest.mark.parametrize("stage", range(4))
def test_deepspeeds_simple_model_trains_as_one_process(stage: int) -> None:
    """Catches an engine with its own data loader and a model that returns its loss, with a layer it does not use."""
    model = problem.SimpleModel()
    start = weights_of(model)
    inputs, classes = problem.samples()
    expected = problem.weights_of_one_process(model, lambda model: model(inputs, classes))
    assert_same_weights(result(f"SimpleModel, zero{stage}"), expected, started_from=start)
