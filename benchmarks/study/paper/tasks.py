"""The paper's learning tasks (Chen et al., arXiv 1905.01422 v8, appendix B)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arsg_dist.imagenet.models import build_model


@dataclass(frozen=True)
class Task:
    """What is learned, and the paper's protocol for it.

    Attributes:
        images: name of the data set.
        model: makes an untrained network; call it under a seed.
        settings: which column of the paper's table of hyper-parameters applies.
        epochs: passes over the training images.
        boost_after: epochs after which ARSGB boosts.
        batch_size: images per update.
        decay_at: share of all updates after which lr is divided by 10; None for never.
        weight_decay: coupled (L2).
        crop: side of random crops, mirrored at random; None for no augmentation.
    """

    images: str
    model: Callable[[], nn.Module]
    settings: str
    epochs: int
    boost_after: int
    batch_size: int = 256
    decay_at: float | None = None
    weight_decay: float = 0.0
    crop: int | None = None


def logistic() -> nn.Module:
    """Multinomial logistic regression on 28×28 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))


def cnn() -> nn.Module:
    """The paper's convolutional network for MNIST: 5×5×20, 5×5×50, 500, 10, with batch norm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, 5), nn.BatchNorm2d(50), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(50 * 4 * 4, 500), nn.BatchNorm1d(500), nn.ReLU()),
        nn.Linear(500, 10),
    )


def resnet20() -> nn.Module:
    """ResNet-20 for 10 classes."""
    return build_model("resnet20", 10)


# lr / 10 at iteration 12,000 of the 80 epochs of 195 updates.
_CIFAR_DECAY = 12_000 / (80 * 195)

TASKS = {
    "mnist_logistic": Task("mnist", logistic, "mnist_logistic", epochs=20, boost_after=5),
    "mnist_cnn": Task("mnist", cnn, "mnist_cnn", epochs=10, boost_after=5),
    "cifar10_fast": Task(
        "cifar10",
        resnet20,
        "cifar10_fast",
        epochs=80,
        boost_after=20,
        decay_at=_CIFAR_DECAY,
        weight_decay=1e-3,
        crop=28,
    ),
    "cifar10_fine": Task(
        "cifar10",
        resnet20,
        "cifar10_fine",
        epochs=80,
        boost_after=50,
        decay_at=_CIFAR_DECAY,
        weight_decay=1e-3,
        crop=28,
    ),
    "digits_logistic": Task("digits", logistic, "mnist_logistic", epochs=4, boost_after=2, batch_size=64),
}
"""Name → task. `digits_logistic` is no task of the paper: it needs no data and is over in a second."""


def augmented(images: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """Random crops, each mirrored with probability 1/2.

    Args:
        images: shape (batch, channels, height, width), square.
        crop: side of the crops.
        generator: on the CPU; the same draws give the same crops on any device.

    Returns:
        Shape (batch, channels, crop, crop).
    """
    batch, channels, side, _ = images.shape
    draws = torch.randint(0, side - crop + 1, (2, batch, 1), generator=generator)
    mirrored = torch.rand(batch, 1, generator=generator) < 0.5
    steps = torch.arange(crop)
    rows = draws[0] + steps
    columns = draws[1] + torch.where(mirrored, steps.flip(0), steps)
    rows, columns = rows.to(images.device), columns.to(images.device)
    which = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return images[which, channel, rows[:, None, :, None], columns[:, None, None, :]]
