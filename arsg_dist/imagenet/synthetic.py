"""Images that are made once and cost nothing to load, to measure everything but the data."""

import torch

from arsg_dist.imagenet.augmentation import train_size
from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.order import IGNORED, SampleKey
from arsg_dist.imagenet.seeding import seed_of

_DISTINCT = 16


class SyntheticSplit:
    """Images of random bytes, `_DISTINCT` of them repeated, made in each loader process at the first access.

    Args:
        config: number of images and classes, image sizes.
        train: which split.
        seed: of the images.
    """

    def __init__(self, config: DataConfig, *, train: bool, seed: int) -> None:
        self.classes = [f"class {label:04d}" for label in range(config.synthetic_classes)]
        self.notes: list[str] = []
        self._config, self._train, self._seed = config, train, seed
        self._images: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return self._config.synthetic_images

    def fingerprint(self) -> list[str | int]:
        """The number of images and classes."""
        return [len(self), len(self.classes)]

    def __getitem__(self, key: SampleKey) -> tuple[torch.Tensor, int] | None:
        """Image and label."""
        key = SampleKey(*key)
        if key.image == IGNORED:
            return None
        size = train_size(self._config, key.batch_epoch) if self._train else self._config.image_size
        if size not in self._images:
            generator = torch.Generator().manual_seed(seed_of(self._seed, size))
            shape = (_DISTINCT, 3, size, size)
            self._images = {size: torch.randint(256, shape, generator=generator, dtype=torch.uint8)}
        label = key.image % len(self.classes) if key.counts else IGNORED
        return self._images[size][key.image % _DISTINCT], label
