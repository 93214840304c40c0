"""Make data that needs no download: handwritten digits, and random images."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.decoding import Contents
from arsg_dist.imagenet.data.sampler import IGNORED, SampleKey, seed_of
from arsg_dist.imagenet.data.transforms import train_size
from arsg_dist.safe_io.files import make_directory, new_directory

DIGITS = Path("data/digits")
"""Where a training without `data.root` has them, relative to the current directory."""

_PIXELS = 32


def digits_tree(directory: Path) -> Path:
    """Write scikit-learn's handwritten digits as an ImageFolder tree.

    Every fifth image of a digit goes to val (355 of 1,797). The 8×8 scans are enlarged to 32×32 pixels. The tree
    appears under its name only when it is complete; several processes may call this at once.

    Args:
        directory: where the tree is or will be.

    Returns:
        `directory`.
    """
    if directory.is_dir():
        return directory
    try:
        with new_directory(directory) as partial:
            _write(partial)
    except OSError:
        if not directory.is_dir():  # else another process was first
            raise
    return directory


def _write(directory: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    for scan, digit in zip(digits.images, digits.target, strict=True):
        split = "val" if seen[digit] % 5 == 4 else "train"
        path = make_directory(directory, split, str(digit)) / f"{seen[digit]:04d}.jpg"
        seen[digit] += 1
        grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
        grey.resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC).save(path, quality=95)


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

    def contents(self, rank: int, ranks: int) -> Contents:
        """Return how many images there are, on rank 0; they have no files."""
        return Contents() if rank else Contents(len(self), 0, len(self.classes))

    def fingerprint(self) -> list[str | int]:
        """Return the number of images and classes."""
        return [len(self), len(self.classes)]

    def __getitem__(self, key: SampleKey) -> tuple[torch.Tensor, int] | None:
        """Return an image and its label."""
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
