from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from arsg_dist.imagenet.config import DataConfig, ProgressiveConfig
from arsg_dist.imagenet.data.dataset import open_splits
from arsg_dist.imagenet.data.sampler import IGNORED, SampleKey
from arsg_dist.imagenet.data.transforms import (
    MEAN,
    STD,
    BatchMixing,
    TrainTransform,
    ValTransform,
    cross_entropy_sum,
    normalised,
)


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 4


def mixing(smoothing: float = 0.0, seed: int = 1, **alphas: float) -> BatchMixing:
    return BatchMixing(DataConfig(**alphas), num_classes=4, label_smoothing=smoothing, seed=seed)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_the_loss_is_torchs(smoothing: float) -> None:
    """Catches smoothed targets that differ from torch's, and ignored images that still pull."""
    images, labels = batch()
    labels[2] = IGNORED
    same, targets = mixing(smoothing)(images, labels, 0)
    assert same is images
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    expected = functional.cross_entropy(
        logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
    )
    assert cross_entropy_sum(logits.double(), targets).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_images_and_targets_have_the_same_shares(alphas: dict[str, float]) -> None:
    """Catches labels mixed with another λ than the images, or with another partner."""
    _, labels = batch()
    constant = (
        labels[:, None, None, None].float().expand(6, 3, 8, 8)
    )  # the value of a pixel is the image's class
    shares = set()
    for update in range(12):
        mixed, targets = mixing(**alphas)(constant.clone(), labels, update)
        assert torch.allclose(targets.sum(dim=1), torch.ones(6), atol=1e-6)
        expected = targets @ torch.arange(4.0)
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), expected, atol=1e-5)
        shares.add(round(float(targets.max(dim=1).values.min()), 4))
    assert len(shares) > 3


def test_mixing_depends_on_seed_and_update_alone() -> None:
    """Catches draws from the global generator, which differ after a resume, and disturb what comes next."""
    images, labels = batch()
    torch.manual_seed(5)
    first = mixing(mixup=0.4)(images, labels, 3)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    again = mixing(mixup=0.4)(images, labels, 3)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], mixing(mixup=0.4)(images, labels, 4)[0])
    assert not torch.equal(first[0], mixing(mixup=0.4, seed=2)(images, labels, 3)[0])


def test_an_image_that_does_not_count_takes_its_share_with_it() -> None:
    """Catches an undecodable image that trains the class of its neighbour, or class 0."""
    images, labels = batch()
    labels[0] = IGNORED
    _, targets = mixing(0.1, mixup=0.4)(images, labels, 3)
    whole = targets[2:].sum(dim=1)
    assert torch.allclose(whole, torch.ones(4))
    assert targets[0].sum() + targets[1].sum() == pytest.approx(1.0)  # of two places, one image counts


def test_transforms_give_the_sizes_of_the_epoch(small_tree: Path) -> None:
    """Catches progressive resizing that reaches the validation, or a batch of mixed sizes."""
    config = DataConfig(
        image_size=32, progressive=ProgressiveConfig(start_size=16, start_epoch=1, end_epoch=3, multiple=8)
    )
    train, val = open_splits(small_tree, config, seed=0)
    assert [tuple(train[SampleKey(epoch, 0, batch_epoch=epoch)][0].shape) for epoch in range(5)] == [
        (3, size, size) for size in (16, 16, 24, 32, 32)
    ]
    assert tuple(val[(0, 0)][0].shape) == (3, 32, 32)


def test_optional_augmentations_act_and_are_reproducible(small_tree: Path) -> None:
    """Catches a setting that is accepted and does nothing, and randomness that is not the image's own."""
    plain = open_splits(small_tree, DataConfig(image_size=32), seed=0)[0]
    for options in ({"rand_augment": 9}, {"random_erasing": 1.0}):
        split = open_splits(small_tree, DataConfig(image_size=32, **options), seed=0)[0]
        assert any(not torch.equal(split[(0, i)][0], plain[(0, i)][0]) for i in range(4))
        assert torch.equal(split[(2, 5)][0], split[(2, 5)][0])


def test_validation_is_the_centre_of_the_resized_image() -> None:
    """Catches another validation protocol than the paper's: resize 256, crop 224."""
    pixels = np.zeros((300, 300, 3), dtype=np.uint8)
    pixels[:16] = 255  # 16/300 of the height: outside the crop, which leaves out 16/256 on each side
    tensor = ValTransform(DataConfig())(Image.fromarray(pixels), 0)
    assert tensor.shape == (3, 224, 224)
    assert tensor.unique(dim=None).numel() <= 3 + 3 * 4  # black, and at most a seam of interpolation
    assert tensor[0, 4:].unique().numel() == 1
    assert TrainTransform(DataConfig())(Image.fromarray(pixels), 0).shape == (3, 224, 224)


@pytest.mark.parametrize("shape", [(4, 3, 7, 9), (1, 3, 1, 1), (2, 3, 5, 1)])
def test_the_layout_of_images_does_not_change_a_bit(shape: tuple[int, ...]) -> None:
    """Catches channels that get each other's mean where rows of pixels are normalised at a time."""
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = images.float().mul(1 / 255).sub(mean).div(std)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = normalised(images.to(memory_format=layout))
        assert torch.equal(found, expected)
        assert found.is_contiguous(memory_format=layout)
