"""ImageFolder trees as batches: checked before the run, in an order that depends on seed and epoch alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from arsg_dist.imagenet.augmentation import TrainTransform, ValTransform
from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.seeding import seed_of
from arsg_dist.imagenet.torchvision_compat import torchvision

IGNORED = -1
"""Label of a place in a batch that holds no image of its own and must not count."""

SampleKey = tuple[int, int]  # (epoch, index); index IGNORED fills up a batch


@dataclass
class Batch:
    """Images and labels of one rank.

    Attributes:
        images: float32, shape (batch, 3, height, width), normalised.
        labels: int64, shape (batch,); IGNORED where the image must not count.
        bad: one message per image that could not be decoded.
    """

    images: torch.Tensor
    labels: torch.Tensor
    bad: list[str]

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (called by the DataLoader)."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.bad)


class ImageTree(Dataset[Any]):
    """One split of an ImageFolder tree.

    Args:
        directory: with one subdirectory per class.
        transform: from a PIL image and the epoch to a float tensor; within an epoch of one shape.
        seed: of the random parts of `transform`.

    Raises:
        ValueError: the directory is missing or has no images, or a class in it has none.
    """

    def __init__(self, directory: Path, transform: Any, *, seed: int) -> None:
        if not directory.is_dir():
            siblings = (
                sorted(p.name for p in directory.parent.iterdir() if p.is_dir())
                if directory.parent.is_dir()
                else []
            )
            raise ValueError(
                f"data directory {directory} does not exist"
                + (f"; {directory.parent} has {', '.join(siblings)}" if siblings else "")
            )
        try:
            folder = torchvision.datasets.ImageFolder(str(directory))
        except FileNotFoundError as error:  # torchvision's word for no classes and for classes without images
            raise ValueError(
                f"data directory {directory} is not a usable ImageFolder tree: {error}"
            ) from None
        self.classes: list[str] = folder.classes
        self._samples: list[tuple[str, int]] = folder.samples
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self._samples)

    def fingerprint(self) -> list[str | int]:
        """What must be equal on all ranks: the number of images and the classes."""
        return [len(self._samples), *self.classes]

    def __getitem__(self, key: SampleKey) -> tuple[torch.Tensor, int] | str | None:
        """Image and label, a message if the file cannot be decoded, None for a place to be filled up.

        What is random in the transform is a function of (seed, epoch, index), so that it does not depend on the
        number of ranks or workers, or on where a run was interrupted.
        """
        epoch, index = key
        if index == IGNORED:
            return None
        path, label = self._samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"cannot decode image {path}: {error}"
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed also looks for GPUs to seed, a tenth of the time of an image.
            torch.default_generator.manual_seed(seed_of(self._seed, epoch, index))
            return self._transform(image, epoch), label


class TrainingOrder(Sampler[list[SampleKey]]):
    """This rank's micro-batches of one epoch.

    The epoch's permutation depends on (seed, epoch) alone and is cut into global batches, each split over
    accumulation steps and ranks. What does not fill a global batch at the end of an epoch is left out of it; the
    next epoch's permutation leaves out others.

    Args:
        num_images: length of the split.
        batch_size: images per update over all ranks and accumulation steps, a multiple of both.
        accumulation_steps: micro-batches per update.
        rank: of this process.
        world_size: number of ranks.
        seed: of the permutations.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.updates_per_epoch = num_images // batch_size
        if self.updates_per_epoch == 0:
            raise ValueError(
                f"batch_size={batch_size} is larger than the training split of {num_images} images"
            )
        self.epoch = 0
        self._num_images = num_images
        self._batch_size = batch_size
        self._accumulation_steps = accumulation_steps
        self._rank, self._world_size = rank, world_size
        self._seed = seed

    def __len__(self) -> int:
        return self.updates_per_epoch * self._accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = torch.Generator().manual_seed(seed_of(self._seed, self.epoch))
        order = torch.randperm(self._num_images, generator=generator)
        used = order[: self.updates_per_epoch * self._batch_size]
        mine = used.view(self.updates_per_epoch * self._accumulation_steps, self._world_size, -1)[
            :, self._rank
        ]
        for micro_batch in mine.tolist():
            yield [(self.epoch, index) for index in micro_batch]


class ValidationOrder(Sampler[list[SampleKey]]):
    """This rank's batches of the validation split: every image on exactly one rank.

    All ranks have equally many batches of equal size, as sharded parameters need (every forward pass gathers them);
    places without an image are filled up with IGNORED.
    """

    def __init__(self, num_images: int, *, batch_size: int, rank: int, world_size: int) -> None:
        per_rank = -(-num_images // world_size)
        self._batches = -(-per_rank // batch_size)
        mine = list(range(rank, num_images, world_size))
        self._indices = mine + [IGNORED] * (self._batches * batch_size - len(mine))
        self._batch_size = batch_size

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self._indices), self._batch_size):
            yield [(0, index) for index in self._indices[start : start + self._batch_size]]


def collate(samples: list[tuple[torch.Tensor, int] | str | None], *, image_size: int) -> Batch:
    """A batch of fixed size; places without a good image get a copy of a good one (batch norm sees it) and IGNORED.

    Args:
        samples: as `ImageTree` returns them.
        image_size: height and width of the black images in a batch that has no good one.
    """
    good = [sample for sample in samples if isinstance(sample, tuple)]
    bad = [sample for sample in samples if isinstance(sample, str)]
    filler = (good[0][0] if good else torch.zeros(3, image_size, image_size), IGNORED)
    pairs = [sample if isinstance(sample, tuple) else filler for sample in samples]
    return Batch(torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs]), bad)


def open_splits(root: Path, config: DataConfig, *, seed: int) -> tuple[ImageTree, ImageTree]:
    """The training and validation splits.

    Raises:
        ValueError: a split is missing or empty, or their classes differ.
    """
    train = ImageTree(root / config.train_split, TrainTransform(config), seed=seed)
    val = ImageTree(root / config.val_split, ValTransform(config), seed=seed)
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise ValueError(
            f"the classes of {root / config.train_split} and {root / config.val_split} differ: "
            f"only in {config.train_split}: {_some(only_train)}; only in {config.val_split}: {_some(only_val)}"
        )
    return train, val


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
    )


def loader(
    dataset: ImageTree, order: Sampler[list[SampleKey]], *, workers: int, image_size: int, pin_memory: bool
) -> DataLoader[Batch]:
    """Batches in the given order.

    Worker processes are started fresh: forking a rank that already communicates may hang.
    """
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=partial(collate, image_size=image_size),
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
    )
