"""Measure loss and accuracy of a whole split, exact on any number of ranks."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from arsg_dist.engine import Communicator
from arsg_dist.imagenet.data.sampler import IGNORED


@dataclass(frozen=True)
class Evaluation:
    """Means over the images that counted.

    Attributes:
        loss: mean cross-entropy, nats.
        top1: share of images whose label has the largest logit, 0 … 1.
        top5: share of images whose label is among the five largest logits, 0 … 1.
        images: how many counted.
    """

    loss: float
    top1: float
    top5: float
    images: int


class Totals:
    """Sums over the images of one rank, in float64; added up over the ranks once."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch.

        Args:
            logits: shape (batch, classes), any floating dtype.
            labels: int64, shape (batch,); IGNORED does not count.
        """
        counted = labels != IGNORED
        logits, labels = logits[counted].float(), labels[counted]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self._sums += torch.stack(
            [
                functional.cross_entropy(logits, labels, reduction="sum").double(),
                best[:, :1].sum().double(),
                best.sum().double(),
                counted.sum().double(),
            ]
        )

    def over_all_ranks(self, communicator: Communicator) -> Evaluation:
        """Return the means over the images of all ranks. Collective.

        Raises:
            ValueError: no image counted.
        """
        loss, top1, top5, images = communicator.all_reduce_sum(self._sums).tolist()
        if images == 0:
            raise ValueError("not one image of the validation split could be decoded")
        return Evaluation(loss / images, top1 / images, top5 / images, int(images))


def average_buffers(module: nn.Module, communicator: Communicator) -> None:
    """Average the floating-point buffers over the ranks. Collective.

    Ranks collect these statistics from their own images; without this, every rank would evaluate and save another
    model.
    """
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if communicator.world_size == 1 or not buffers:
        return
    flat = torch.cat([buffer.detach().double().flatten() for buffer in buffers])
    mean = communicator.all_reduce_sum(flat) / communicator.world_size
    with torch.no_grad():
        for buffer, part in zip(
            buffers, torch.split(mean, [buffer.numel() for buffer in buffers]), strict=True
        ):
            buffer.copy_(part.view_as(buffer))
