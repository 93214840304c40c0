"""The paper's logistic regression, in its own protocol's data and model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.study.paper.data import load_images
from benchmarks.study.paper.tasks import TASKS
from benchmarks.study.problem import Problem


class Logistic(Problem):
    """Multinomial logistic regression on MNIST, or on scikit-learn's digits, which need no data.

    Args:
        seed: of weights and batches.
        data: directory that holds `mnist/`.
        name: of the paper's task.
    """

    def __init__(self, seed: int, data: Path | None, name: str) -> None:
        task = TASKS[name]
        self._images = load_images(task.images, data / "mnist" if data else None)
        self._seed, self._batch = seed, task.batch_size
        torch.manual_seed(seed)
        self.module = task.model()

    def batch_loss(self, update: int) -> Tensor:
        """Return the mean cross entropy of a batch of the epoch's random order."""
        count = len(self._images.train_images) // self._batch
        epoch, place = divmod(update, count)
        if place == 0:
            generator = torch.Generator().manual_seed(1_000 * self._seed + epoch)
            self._order = torch.randperm(len(self._images.train_images), generator=generator)
        chosen = self._order[place * self._batch : (place + 1) * self._batch]
        return self._loss(self._images.train_images[chosen], self._images.train_labels[chosen])

    @torch.no_grad()
    def validation_loss(self, full: bool) -> float:
        """Return the mean cross entropy of the validation images."""
        count = len(self._images.val_images) if full else 2_000
        return float(self._loss(self._images.val_images[:count], self._images.val_labels[:count]))

    @torch.no_grad()
    def training_loss(self) -> float:
        """Return the mean cross entropy of the first 10,000 training images."""
        return float(self._loss(self._images.train_images[:10_000], self._images.train_labels[:10_000]))

    def _loss(self, pixels: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.module(self._images.normalised(pixels)), labels)
