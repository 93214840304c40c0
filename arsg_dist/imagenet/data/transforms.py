"""Transform decoded images to network inputs, and mix training batches."""

from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.sampler import seeded
from arsg_dist.imagenet.torchvision_compat import v2

_MIXING = 1  # keeps these random numbers apart from those of the images
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, for values from 0 to 1."""


Channels = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of the three channels."""


@cache
def _constants(device: torch.device, channels: Channels) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in channels)
    return mean, std


def normalised(images: Tensor, channels: Channels = (MEAN, STD)) -> Tensor:
    """Normalise images to mean 0 and variance 1 of their channels, float32.

    Args:
        images: uint8, shape (batch, 3, height, width); floating ones are taken as normalised already.
        channels: means and standard deviations for values from 0 to 1, those of ImageNet.
    """
    if images.is_floating_point():
        return images
    mean, std = _constants(images.device, channels)
    values = images.float().mul_(1 / 255)
    if values.is_contiguous(memory_format=torch.channels_last):
        # A row of pixels at a time: on a CPU an operation over 3 values at a time takes nine times as long.
        rows, width = values.permute(0, 2, 3, 1).flatten(2), values.shape[3]
        rows.sub_(mean.flatten().repeat(width)).div_(std.flatten().repeat(width))
        return values
    return values.sub_(mean).div_(std)


def train_size(config: DataConfig, epoch: int) -> int:
    """Return the side of an epoch's training images (counted from 0), pixels."""
    full, ramp = config.full_train_size, config.progressive
    if not ramp.start_size or epoch >= ramp.end_epoch:
        return full
    done = max(0, epoch - ramp.start_epoch) / (ramp.end_epoch - ramp.start_epoch)
    size = ramp.start_size + done * (full - ramp.start_size)
    return max(ramp.start_size, min(full, round(size / ramp.multiple) * ramp.multiple))


def val_resize(size: int) -> int:
    """Return the shorter side of an image before its validation crop, pixels."""
    return round(size * 256 / 224)


class TrainTransform:
    """Decode-to-tensor for training; what is random uses torch's global generator, which the caller seeds.

    Args:
        config: which augmentation, which sizes.
    """

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._made: dict[int, Any] = {}

    def __call__(self, image: Image.Image, epoch: int) -> Tensor:
        """Return a uint8 tensor of shape (3, size, size), with the epoch's size."""
        size = train_size(self._config, epoch)
        if size not in self._made:
            self._made[size] = self._make(size)
        tensor: Tensor = self._made[size](image)
        return tensor

    def _make(self, size: int) -> Any:
        config = self._config
        steps: list[Any]
        if config.augmentation == "imagenet":
            steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        elif config.augmentation == "crop":
            scale = round(config.image_size * size / config.crop_size)
            steps = [v2.Resize((scale, scale)), v2.RandomCrop(size), v2.RandomHorizontalFlip()]
        else:
            steps = [v2.Resize((size, size))]
        if config.rand_augment:
            steps.append(v2.RandAugment(magnitude=config.rand_augment))
        steps.append(v2.PILToTensor())
        if config.random_erasing:
            mean = [round(255 * value) for value in MEAN]  # 0 once it is normalised
            steps.append(v2.RandomErasing(p=config.random_erasing, value=mean))
        return v2.Compose(steps)


class ValTransform:
    """Decode-to-tensor for validation; nothing in it is random.

    Args:
        config: sizes, and what is done.
        resize: with augmentation "imagenet", the shorter side before the crop, pixels; 0: `val_resize` of the size.
        bicubic: interpolate so, and not bilinearly.
    """

    def __init__(self, config: DataConfig, *, resize: int = 0, bicubic: bool = False) -> None:
        size = config.image_size
        how = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
        steps: list[Any] = [v2.Resize((size, size), how)]
        self._shorter, self._max_pixels = 0, config.max_image_pixels
        if config.augmentation == "imagenet":
            self._shorter = resize or val_resize(size)
            steps = [v2.Resize(self._shorter, how), v2.CenterCrop(size)]
        self._transform = v2.Compose([*steps, v2.PILToTensor()])

    def __call__(self, image: Image.Image, epoch: int) -> Tensor:
        """Return a uint8 tensor (3, image_size, image_size), alike in every epoch.

        Raises:
            ValueError: an image so narrow that it would grow beyond `max_image_pixels` before it is cropped.
        """
        if self._shorter**2 * max(image.size) > self._max_pixels * min(image.size):
            width, height = image.size
            raise ValueError(
                f"{width} × {height} pixels: with {self._shorter} on the shorter side, as validation resizes it, it "
                f"would have more than data.max_image_pixels, {self._max_pixels:,}"
            )
        tensor: Tensor = self._transform(image)
        return tensor


class BatchMixing:
    """Mixup and cutmix on one rank's training batches, and labels as the loss takes them.

    Which of the two, the share λ and the rectangle are functions of (seed, update): the same on every rank and in every
    micro-batch of the update, and after a resume. Each image is mixed with its neighbour in the rank's micro-batch, so
    which images meet depends on the number of ranks.

    Args:
        config: the two α.
        num_classes: of the labels.
        label_smoothing: share of a label that is spread evenly over the classes.
        seed: of the run.
    """

    def __init__(self, config: DataConfig, *, num_classes: int, label_smoothing: float, seed: int) -> None:
        kinds = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
        self._choices = [
            kind(alpha=getattr(config, name)) for name, kind in kinds.items() if getattr(config, name)
        ]
        self._num_classes = num_classes
        self._label_smoothing = label_smoothing
        self._seed = seed

    def __call__(self, images: Tensor, labels: Tensor, update: int) -> tuple[Tensor, Tensor]:
        """Mix images, and make the probabilities that predictions are compared with.

        Args:
            images: floating point, shape (batch, 3, height, width).
            labels: int64, shape (batch,); negative for images that must not count.
            update: weight updates made so far.

        Returns:
            Images of the same shape, and float32 targets of shape (batch, classes). A row of targets sums to the share
            of its image that counts.
        """
        counts = labels >= 0
        targets = functional.one_hot(labels.clamp(min=0), self._num_classes).float() * counts[:, None]
        if self._choices:
            with seeded(self._seed, update, 0, _MIXING):
                chosen = self._choices[int(torch.randint(len(self._choices), ()))]
                images, targets = chosen(images, targets)
        smoothing = self._label_smoothing
        if smoothing:
            share = targets.sum(dim=1, keepdim=True)
            targets = targets * (1 - smoothing) + share * (smoothing / self._num_classes)
        return images, targets


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy of `BatchMixing`'s targets and logits, in float32."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
