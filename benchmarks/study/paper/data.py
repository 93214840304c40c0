"""Image sets as tensors in memory: MNIST, CIFAR-10 and scikit-learn's digits. Nothing is downloaded."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Pixels in [0, 1], not standardised: so the losses are those seen with the authors' code (ADAM's about 0.23).
_MNIST_MEAN, _MNIST_STD = (0.0,), (1.0,)
_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """A training and a validation split.

    Attributes:
        train_images: uint8, shape (n, channels, height, width).
        train_labels: int64, shape (n,).
        val_images: as train_images.
        val_labels: as train_labels.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
    """

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def limited(self, train: int | None, val: int | None) -> Images:
        """At most so many images of each split: always the same random choice. None: all."""

        def part(images: Tensor, labels: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
            if count is None or count >= len(images):
                return images, labels
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
            return images[chosen], labels[chosen]

        return Images(
            *part(self.train_images, self.train_labels, train),
            *part(self.val_images, self.val_labels, val),
            self.mean,
            self.std,
        )

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        splits = (self.train_images, self.train_labels, self.val_images, self.val_labels)
        return Images(*(tensor.to(device) for tensor in splits), self.mean, self.std)

    def normalised(self, images: Tensor) -> Tensor:
        """float32 images with mean 0 and standard deviation 1."""
        mean, std = (
            torch.tensor(v, device=images.device).reshape(1, -1, 1, 1) for v in (self.mean, self.std)
        )
        return (images.float() / 255 - mean) / std


@cache
def load_images(name: str, directory: Path | None) -> Images:
    """One of "mnist", "cifar10", "digits".

    Args:
        name: of the data set.
        directory: for MNIST the four IDX files (.gz or not); for CIFAR-10 its binary version (`data_batch_1.bin`,
            ...) or an ImageFolder tree with train/ and test/ (or val/); for digits None.

    Raises:
        ValueError: the directory is not given or does not hold the data.
    """
    if name == "digits":
        return _digits()
    if directory is None:
        raise ValueError(f"{name} is needed: give its directory with --{name} DIR")
    if not directory.is_dir():
        raise ValueError(f"--{name} {directory} is not a directory")
    return _mnist(directory) if name == "mnist" else _cifar10(directory)


def _idx(directory: Path, name: str) -> Tensor:
    for path, opener in ((directory / f"{name}.gz", gzip.open), (directory / name, open)):
        if path.is_file():
            with opener(path, "rb") as file:
                content = file.read()
            shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
            data = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
            return torch.from_numpy(data.reshape(shape).copy())
    raise ValueError(f"{directory} has no {name} (.gz or not): MNIST's four IDX files are needed")


def _mnist(directory: Path) -> Images:
    splits = [
        tensor
        for split in ("train", "t10k")
        for tensor in (
            _idx(directory, f"{split}-images-idx3-ubyte").unsqueeze(1),
            _idx(directory, f"{split}-labels-idx1-ubyte").long(),
        )
    ]
    return Images(*splits, _MNIST_MEAN, _MNIST_STD)


def _cifar10(directory: Path) -> Images:
    if (directory / "data_batch_1.bin").is_file():
        files = [[directory / f"data_batch_{i}.bin" for i in range(1, 6)], [directory / "test_batch.bin"]]
        splits = [tensor for part in files for tensor in _cifar_records(part)]
    else:
        val = next((directory / name for name in ("test", "val") if (directory / name).is_dir()), None)
        if val is None or not (directory / "train").is_dir():
            raise ValueError(f"{directory} holds neither data_batch_1.bin nor train/ and test/ with images")
        splits = [tensor for split in (directory / "train", val) for tensor in _image_tree(split)]
    return Images(*splits, _CIFAR_MEAN, _CIFAR_STD)


def _cifar_records(paths: list[Path]) -> tuple[Tensor, Tensor]:
    records = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 1 + 3 * 32 * 32) for path in paths])
    return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(
        records[:, 0].astype(np.int64)
    )


def _image_tree(directory: Path) -> tuple[Tensor, Tensor]:
    from arsg_dist.imagenet.data.decoding import decode
    from arsg_dist.safe_io.files import read_bytes

    classes = sorted(path.name for path in directory.iterdir() if path.is_dir())
    files = [
        (path, label) for label, name in enumerate(classes) for path in sorted((directory / name).iterdir())
    ]
    pixels = np.stack([np.asarray(decode(read_bytes(path, follow=True))) for path, _ in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        [label for _, label in files]
    )


def _digits() -> Images:
    """1,797 scans of 8×8 pixels, enlarged to 24×24 with a border of 2; every fifth is for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    scans = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    images = torch.nn.functional.pad(scans.repeat_interleave(3, 2).repeat_interleave(3, 3), (2, 2, 2, 2))
    labels = torch.from_numpy(digits.target).long()
    val = torch.arange(len(images)) % 5 == 4
    return Images(images[~val], labels[~val], images[val], labels[val], (0.25,), (0.35,))
