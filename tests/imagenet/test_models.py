"""Networks of others: further classifiers inside them, and the images that they cannot take."""

import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from arsg_dist.engine import Ranks, SingleProcessCommunicator
from arsg_dist.imagenet.config import BoostConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from arsg_dist.imagenet.models import build_model, require_image_sizes, weighted_logits
from arsg_dist.imagenet.output import run_log
from arsg_dist.imagenet.torchvision_compat import torchvision
from arsg_dist.imagenet.training import setup as training
from arsg_dist.imagenet.training.parts import Start
from tests.imagenet.every_network import NAMES, RESULTS, own_size, read, train_once
from tests.imagenet.test_run_by_hand import CLASSES, ByHand, recipe, records_of

SIZE = 4


def start(output: Path, config: TrainConfig, **settings: Any) -> int:
    communicator = SingleProcessCommunicator()
    return training.train(config, Start("single", output, **settings), Ranks(0, 1, 0, "none"), communicator)


class Three(nn.Module):
    """Three linear classifiers, two of which speak in training only, in torchvision's tuple for GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(3 * SIZE * SIZE, CLASSES) for _ in range(3))

    def forward(self, images: Tensor) -> Any:
        main, second, first = (head(images.flatten(1)) for head in self.heads)
        return torchvision.models.GoogLeNetOutputs(main, second, first) if self.training else main


@pytest.mark.turn(2)
def test_further_classifiers_train_with_their_usual_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a loss of the main output alone, other shares than 0.3, or a validation that counts them: against losses
    and gradients worked out from the images themselves."""
    torch.manual_seed(3)
    network = Three()
    weights = [head.weight.detach().double() for head in network.heads]
    biases = [head.bias.detach().double() for head in network.heads]
    monkeypatch.setattr(training, "build_model", lambda *_, **__: network)
    monkeypatch.setattr(run_log, "draw_learning_curve", lambda directory: directory / "none")
    config = recipe(
        epochs=1,
        batch_size=10,
        accumulation_steps=1,
        optimizer=OptimizerConfig(type="SGD", params={"lr": 0.5}),
        schedule=ScheduleConfig(),
        boost=BoostConfig(),
        ema_decay=0.0,
    )
    assert start(tmp_path / "run", config) == 0
    images, labels = ByHand.images_of(config, train=True)
    expected = 0.0
    for share, weight, bias, head in zip((1, 0.3, 0.3), weights, biases, network.heads, strict=True):
        weight.requires_grad_(True)
        loss = share * functional.cross_entropy(images @ weight.T + bias, labels)
        expected += loss.item()
        (gradient,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(head.weight.double(), weight - 0.5 * gradient, rtol=0, atol=1e-5)
    train, epoch = records_of(tmp_path / "run")
    assert train["loss"] == pytest.approx(expected, rel=1e-5)
    images, labels = ByHand.images_of(config, train=False)
    head = network.heads[0]
    main = functional.cross_entropy(images @ head.weight.double().T + head.bias.double(), labels)
    assert epoch["val_loss"] == pytest.approx(main.item(), rel=1e-5)


def test_the_outputs_of_torchvisions_networks_have_their_shares() -> None:
    """Catches a field of another name, or in another order, than torchvision gives it: both networks are real."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of initial weights that may be others one day
        networks = {name: build_model(name, 3) for name in ("googlenet", "inception_v3")}
    shares = {}
    for name, network in networks.items():
        outputs = network.to("meta")(torch.empty(2, 3, 299, 299, device="meta"))
        assert {logits.shape for _, logits in weighted_logits(outputs)} == {(2, 3)}
        shares[name] = [share for share, _ in weighted_logits(outputs)]
    assert shares == {"googlenet": [1.0, 0.3, 0.3], "inception_v3": [1.0, 0.4]}
    logits = torch.zeros(2, 3)
    ((share, same),) = weighted_logits(logits)
    assert (share, same is logits) == (1.0, True)
    for other in ({"logits": logits}, (logits, logits), namedtuple("Boxes", "logits boxes")(logits, logits)):
        with pytest.raises(ValueError, match="no output of a classifier"):
            weighted_logits(other)


class Counting(nn.Module):
    """Looks at values, so that it cannot be computed from shapes, and does not take images of fewer than 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if images.shape[-1] < 8 or float(images.sum()) > 0:
            raise RuntimeError("too small\nfor this network")
        dropped: Tensor = functional.dropout(self.normalise(images).mean(dim=(2, 3)), training=self.training)
        return dropped


class TwoNames(nn.Module):
    """Has a module of two names, with a buffer, and a weight in two modules.

    Args:
        values: looked at, so that it cannot be computed from shapes.
    """

    def __init__(self, *, values: bool) -> None:
        super().__init__()
        self.normalise = self.again = nn.BatchNorm2d(3)
        self.inwards = nn.Conv2d(3, 3, 1)
        self.outwards = nn.Conv2d(3, 3, 1)
        self.outwards.weight = self.inwards.weight
        self.values = values

    def forward(self, images: Tensor) -> Tensor:
        if self.values and float(images.sum()) > 0:
            raise RuntimeError("images have no values yet")
        images = self.outwards(self.inwards(self.again(self.normalise(images))))
        if self.inwards.weight is not self.outwards.weight:
            raise RuntimeError("the weight is another one")
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("name", "train", "batch_size", "val", "message"),
    [
        (
            "alexnet",
            [64, 32],
            4,
            64,
            r"alexnet cannot train on 4 images of 32 × 32 .*too small; choose other sizes",
        ),
        ("alexnet", [64], 4, 32, "alexnet cannot be validated on 1 image of 32 × 32 pixels"),
        ("vit_b_16", [64], 4, 224, "Expected 224 but got 64"),
        ("inception_v3", [64], 4, 299, "cannot train on 4 images of 64 × 64"),
        (
            "resnet18",
            [32],
            1,
            32,
            r"cannot train on 1 image of 32 × 32 .*batch norm needs two values: choose a larger",
        ),
        ("resnet18", [33], 1, 1, ""),
        ("resnet18", [32], 2, 32, ""),
        ("googlenet", [64], 2, 64, ""),
        ("counting", [8], 5, 8, ""),
        (
            "counting",
            [9, 7, 8],
            5,
            8,
            r"cannot train on 5 images of 7 × 7 pixels at a time: too small; choose",
        ),
        ("no classifier", [8], 2, 8, "returns dict, which is no output of a classifier"),
        ("two names", [8], 2, 8, ""),
        ("two names, values", [8], 2, 8, ""),
    ],
)
def test_images_that_a_network_cannot_take_are_refused_in_one_line(
    name: str, train: list[int], batch_size: int, val: int, message: str
) -> None:
    """Catches a traceback after the ranks have begun, a size or a way (training, validation) that is not tried, and a
    refusal of what works; a trial that counts in batch norm's statistics or draws from the run's random numbers, or
    leaves other tensors in a module of two names than it had."""
    own = {
        "counting": Counting,
        "no classifier": lambda: nn.ModuleDict(),
        "two names": lambda: TwoNames(values=False),
        "two names, values": lambda: TwoNames(values=True),
    }
    model = own[name]() if name in own else build_model(name, 3)
    if name == "no classifier":
        model.forward = lambda images: {"logits": images}  # type: ignore[method-assign]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parameters = list(model.named_parameters(remove_duplicate=False))
    state = torch.get_rng_state()
    if message:
        with pytest.raises(ValueError, match=message) as found:
            require_image_sizes(model, name, train=train, batch_size=batch_size, val=val)
        assert "\n" not in str(found.value)
    else:
        require_image_sizes(model, name, train=train, batch_size=batch_size, val=val)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for (key, tensor), (_, first) in zip(
        model.named_parameters(remove_duplicate=False), parameters, strict=True
    ):
        assert tensor is first, key
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


SMALLEST = {
    *(
        "alexnet",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "efficientnet_v2_s",
        "googlenet",
        "inception_v3",
    ),
    *(
        "maxvit_t",
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_x_400mf",
        "regnet_y_400mf",
        "resnet18",
    ),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_32"),
    *("wide_resnet50_2",),
}
"""Of each family of torchvision's networks."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.turn(number % 3)) for number, name in enumerate(NAMES)],
)
def test_every_network_of_torchvision_trains_and_validates(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Catches a network that the program offers and that ends in a traceback: one update and one validation of each, at
    the size it is made for."""
    if name not in SMALLEST and not request.config.getoption("--full"):
        pytest.skip("a larger one of its family; --full has all")
    train_once(name, tmp_path / "run")


def test_every_network_of_torchvision_is_in_the_results() -> None:
    """Catches one that the program offers and nobody has thought of since the results were written, or that failed.
    Those not yet run are recorded as such."""
    found = read(RESULTS)
    assert [name for name in NAMES if name not in found or "failed" in found[name]] == []
    trained = {name: record["size"] for name, record in found.items() if "not run" not in record}
    assert trained == {name: own_size(name) for name in trained}
