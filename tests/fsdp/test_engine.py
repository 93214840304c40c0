"""The engine `fsdp`; what it shares with others is in tests/engines, tests/imagenet and tests/checkpoint."""

from typing import Any

import pytest
import torch
from torch import nn

from arsg_dist import ARSG
from arsg_dist.engine import SingleProcessCommunicator, SingleProcessEngine, load_builder
from arsg_dist.fsdp import FSDPEngine, shard, units_of
from arsg_dist.imagenet.models import build_model
from tests.engines.test_registry import settings
from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.results import results_of


def result(name: str) -> Any:
    return results_of("warm torchrun", 4, "fsdp/jobs/mesh_job")[name]


def started_from() -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in toy.build_model().state_dict().items()}


@pytest.mark.ranks
def test_replicas_of_shards_equal_one_process() -> None:
    """Catches gradients averaged over one dimension of the mesh, a norm of one shard, and weights that ranks began
    with on their own."""
    assert_same_weights(
        result("trained"), toy.single_process_weights(clip_grad_norm=0.5), started_from=started_from()
    )


@pytest.mark.ranks
def test_replicas_of_shards_resume_with_the_same_bits() -> None:
    """Catches shards that are written by both replicas, or read at another place."""
    for name, tensor in result("trained").items():
        assert torch.equal(result("resumed")[name], tensor), name


@pytest.mark.ranks
def test_one_ranks_bad_gradient_leaves_the_update_out_everywhere() -> None:
    """Catches ranks that decide alone, of which one then waits for the others."""
    assert result("skipped") == 1


@pytest.mark.ranks
def test_the_base_iterate_is_reached_through_shards() -> None:
    """Catches an evaluation with the weights that were gathered at x, and an x that does not come back."""
    module = toy.build_model()
    engine = SingleProcessEngine(module, ARSG(module.parameters(), **toy.HYPERPARAMETERS), clip_grad_norm=0.5)
    for update in range(toy.UPDATES):
        inputs, targets = toy.batch(update)
        engine.backward(toy.loss_of(engine.module(inputs), targets))
        engine.step()
    with engine.base_iterate():
        # θ has moved little, by differences of numbers as large as the movement of x: their roundings remain.
        assert_same_weights(
            result("theta"), dict(module.state_dict()), started_from=started_from(), relative=1e-3
        )
        expected = module(toy.batch(0)[0]).detach()
    torch.testing.assert_close(result("logits at theta"), expected, rtol=1e-4, atol=1e-5)
    for name, tensor in result("trained").items():
        assert torch.equal(result("after")[name], tensor), name


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (build_model("resnet18", 10), [f"layer{row}.{index}" for row in range(1, 5) for index in range(2)]),
        (build_model("vit_b_16", 10), [f"encoder.layers.encoder_layer_{index}" for index in range(12)]),
        (build_model("resnet20", 10), [f"blocks.{index}" for index in range(9)]),
        (nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), []),
    ],
    ids=["resnet18", "vit_b_16", "resnet20", "two layers"],
)
def test_units_are_the_blocks(module: nn.Module, expected: list[str]) -> None:
    """Catches a network gathered whole, or layer by layer."""
    assert [name for name, _ in units_of(module)] == expected


def test_what_does_not_work_is_refused_before_training() -> None:
    """Catches fp16 that underflows without loss scaling, whole parameters under an engine of shards, and scalars."""
    with pytest.raises(ValueError, match="fp16 does not work with the engine fsdp"):
        load_builder("fsdp")(settings(precision="fp16"), world_size=2)
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"call arsg_dist\.fsdp\.shard"):
        FSDPEngine(module, ARSG(module.parameters()), SingleProcessCommunicator())
    module.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match="'scale' has no dimension"):
        shard(module)
