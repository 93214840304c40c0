"""Classification of images: the paper's logistic regression and CNN; ResNet-20 and a small ViT on CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.study.paper.data import Images, load_images
from benchmarks.study.paper.tasks import TASKS, augmented, resnet20
from benchmarks.study.problem import Problem
from benchmarks.study.text import Block


class Classification(Problem):
    """Mean cross entropy of images in batches of the epoch's random order.

    Args:
        seed: of weights and batches.
        images: both splits.
        model: makes a network for them.
        batch: images per update.
        border: pixels of padding, of which a random crop of the images' size is taken, at random mirrored; None: the
            images as they are.
        part: how many validation images for curves.
        whole: how many, of either split, at the end of a run.
    """

    def __init__(
        self,
        seed: int,
        images: Images,
        model: Callable[[], nn.Module],
        batch: int,
        border: int | None = None,
        part: int = 2_000,
        whole: int = 10_000,
    ) -> None:
        self._images, self._seed, self._batch, self._border = images, seed, batch, border
        self._part, self._whole = part, whole
        torch.manual_seed(seed)
        self.module = model()

    def batch_loss(self, update: int) -> Tensor:
        """Return the loss of a batch."""
        count = len(self._images.train_images) // self._batch
        epoch, place = divmod(update, count)
        if place == 0:
            generator = torch.Generator().manual_seed(1_000 * self._seed + epoch)
            self._order = torch.randperm(len(self._images.train_images), generator=generator)
        chosen = self._order[place * self._batch : (place + 1) * self._batch]
        pixels = self._images.train_images[chosen]
        if self._border is not None:
            generator = torch.Generator().manual_seed(100_000 * (self._seed + 1) + update)
            side = pixels.shape[-1]
            pixels = augmented(functional.pad(pixels, (self._border,) * 4), side, generator)
        return self._loss(pixels, self._images.train_labels[chosen])

    def validation_loss(self, full: bool) -> float:
        """Return the loss on validation images."""
        count = self._whole if full else self._part
        return self._mean(self._images.val_images[:count], self._images.val_labels[:count])

    def training_loss(self) -> float:
        """Return the loss on the first training images, as they are."""
        return self._mean(self._images.train_images[: self._whole], self._images.train_labels[: self._whole])

    @torch.no_grad()
    def _mean(self, pixels: Tensor, labels: Tensor) -> float:
        self._count_batch_statistics()
        self.module.eval()
        parts = zip(pixels.split(1_000), labels.split(1_000), strict=True)
        total = sum(float(self._loss(part, of_part)) * len(part) for part, of_part in parts)
        self.module.train()
        return total / len(pixels)

    def _count_batch_statistics(self) -> None:
        """Let batch norm have the statistics of these weights.

        An average over the training has those of where the gradients were taken, which is neither x nor θ nor
        Schedule-Free's average: one would be evaluated with another one's.
        """
        norms = [one for one in self.module.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
        for pixels in self._images.train_images[:512].split(128):
            self.module(self._images.normalised(pixels))

    def _loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.module(self._images.normalised(pixels)), labels)


class ViT(nn.Module):
    """Pre-norm encoder of patches of 4×4 pixels with learned positions, mean over the patches, 10 classes.

    Args:
        side: of the images.
        width: of the residual stream; width/32 heads.
        layers: how many blocks.
    """

    def __init__(self, side: int, width: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(torch.randn((side // 4) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, width // 32, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.output(self.norm(self.blocks(x)).mean(1))


def of_the_paper(seed: int, data: Path | None, name: str, batch: int | None = None, **sizes: int) -> Problem:
    """Return a task of the paper on MNIST, or on scikit-learn's digits, which need no data.

    Args:
        seed: of weights and batches.
        data: directory of the data sets.
        name: of the task there.
        batch: images per update; default: the paper's.
        sizes: of the validation, `part` and `whole`.
    """
    task = TASKS[name]
    images = load_images(task.images, data / "mnist" if data else None)
    return Classification(seed, images, task.model, batch or task.batch_size, **sizes)


def cifar_resnet(seed: int, data: Path | None) -> Problem:
    """Return ResNet-20 on CIFAR-10 at 16 pixels."""
    return Classification(seed, _cifar(data), resnet20, 64, border=2, part=500, whole=2_500)


def cifar_vit(seed: int, data: Path | None) -> Problem:
    """Return a ViT of 0.1 M parameters on CIFAR-10 at 16 pixels."""
    return Classification(seed, _cifar(data), lambda: ViT(16, 64, 2), 64, border=2, part=500, whole=2_500)


@cache
def _cifar(data: Path | None) -> Images:
    """Return CIFAR-10 with means of 2×2 pixels, for a quarter of the time."""
    images = load_images("cifar10", data / "cifar10" if data else None)

    def part(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        # A tree is read class by class: its first images, of which losses are taken, would be of the first classes.
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        return functional.avg_pool2d(pixels.float(), 2).round().to(torch.uint8)[order], labels[order]

    return Images(
        *part(images.train_images, images.train_labels),
        *part(images.val_images, images.val_labels),
        images.mean,
        images.std,
    )
