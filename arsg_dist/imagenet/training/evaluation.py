"""Measure a network over a validation split: the one definition, for training and for `arsg-imagenet evaluate`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist.engine import JobError
from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.dataset import Batch, batches
from arsg_dist.imagenet.data.transforms import MEAN, STD, Channels, normalised
from arsg_dist.imagenet.training.metrics import Totals


def network_inputs(
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype,
    *,
    channels_last: bool,
    channels: Channels = (MEAN, STD),
) -> tuple[Tensor, Tensor]:
    """Move a batch to a device, its images normalised and as a network takes them; return images and labels."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = normalised(batch.images.to(device, non_blocking=True), channels)
    labels = batch.labels.to(device, non_blocking=True)
    return images.to(dtype=dtype, memory_format=layout), labels


def measure(
    module: nn.Module,
    loader: Iterable[Batch],
    *,
    device: torch.device,
    to_device: Callable[[Batch], tuple[Tensor, Tensor]],
    forward: Callable[[nn.Module, Tensor], Any],
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Totals, list[str]] | None:
    """Add up loss and right answers over this rank's share of a split, in evaluation mode.

    Args:
        module: the network.
        loader: of a `ValidationSampler`, so that every image is on one rank; places without an image do not count.
        device: of the network.
        to_device: makes inputs and labels of a batch.
        forward: computes logits.
        stopped: asked after each batch whether to end.

    Returns:
        The sums, and a message for each image that could not be decoded; None if `stopped` said so.
    """
    module.eval()
    totals, bad = Totals(device), list[str]()
    with torch.no_grad():
        for batch in batches(loader):
            inputs, labels = to_device(batch)
            bad += batch.bad
            totals.add(forward(module, inputs.to(next(module.parameters()).dtype)), labels)
            if stopped():
                return None
    return totals, bad


def refuse_bad_images(messages: list[str], config: DataConfig) -> None:
    """End the job for images that could not be decoded, unless they are to be left out; raise JobError."""
    if messages and config.on_bad_image == "error":
        raise JobError(
            "\n".join(messages) + "\n(--data.on_bad_image skip leaves such images out and counts them)"
        )
