"""Load a split on one rank: images decoded, augmented and put into batches."""

import gc
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from arsg_dist.engine import JobError
from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.builtin import SyntheticSplit
from arsg_dist.imagenet.data.decoding import UNDECODABLE, Contents, ImageSource, decode
from arsg_dist.imagenet.data.delivery import Shared, WatchedLoader
from arsg_dist.imagenet.data.folder import ImageTree
from arsg_dist.imagenet.data.sampler import IGNORED, SampleKey, seeded
from arsg_dist.imagenet.data.tar_shards import TarShards
from arsg_dist.imagenet.data.transforms import TrainTransform, ValTransform
from arsg_dist.imagenet.signals import signals_held
from arsg_dist.safe_io.processes import safe_start
from arsg_dist.safe_io.text import printable


@dataclass
class Batch:
    """Images and labels of one rank.

    Attributes:
        images: shape (batch, 3, height, width), uint8, or float32 and normalised already: for `normalised`.
        labels: int64, shape (batch,); IGNORED where the image must not count.
        bad: one message per image that could not be decoded.
    """

    images: torch.Tensor
    labels: torch.Tensor
    bad: list[str]

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory, for the DataLoader."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.bad)

    def share_memory_(self) -> "Batch":
        """Move the batch into shared memory; return it.

        Raises:
            RuntimeError: there is no room.
        """
        for tensor in (self.images, self.labels):
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        return self


class ImageSplit(Dataset[Any]):
    """The images of a source, decoded and transformed.

    Args:
        source: of encoded images.
        transform: from a PIL image and the epoch to a uint8 tensor; within an epoch of one shape.
        seed: of the random parts of `transform`.
        max_pixels: that an image may have.
    """

    def __init__(
        self, source: ImageSource, transform: Any, *, seed: int, max_pixels: int = DataConfig.max_image_pixels
    ) -> None:
        self.classes = source.classes
        self.notes = source.notes
        self.source = source
        self._max_pixels = max_pixels
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> list[str | int]:
        """Return what must be equal on all ranks."""
        return self.source.fingerprint()

    def contents(self, rank: int, ranks: int) -> Contents:
        """Sum up one rank's share of the files."""
        return self.source.contents(rank, ranks)

    def __getitem__(self, key: SampleKey) -> tuple[torch.Tensor, int] | str | None:
        """Return image and label, a message if it is none, None for a place to fill up.

        What is random in the transform is a function of (seed, epoch, index), so that it does not depend on the
        number of ranks or workers, or on where a run was interrupted.
        """
        epoch, index, counts, batch_epoch = SampleKey(*key)
        if index == IGNORED:
            return None
        try:
            encoded, label = self.source.read(index)
            image = decode(encoded, max_pixels=self._max_pixels)
            with seeded(self._seed, epoch, index):
                return self._transform(image, batch_epoch), label if counts else IGNORED
        except UNDECODABLE as error:
            return cannot_decode(self.source, index, error) if counts else None
        except MemoryError:  # the machine's fault, not the image's, whose size is bounded
            raise MemoryError(f"no memory left to decode image {self.source.name(index)}") from None


Split = ImageSplit | SyntheticSplit


def cannot_decode(source: ImageSource, index: int, error: Exception) -> str:
    """Say which image is no usable one, and why, in words that may be shown."""
    return printable(f"cannot decode image {source.name(index)}: {error}", limit=5000)


def collate(samples: list[tuple[torch.Tensor, int] | str | None], *, image_size: int) -> Batch:
    """Make a batch of fixed size; a good image and IGNORED fill it up.

    Args:
        samples: as `ImageSplit` returns them.
        image_size: height and width of the black images in a batch that has no good one.
    """
    good = [sample for sample in samples if isinstance(sample, tuple)]
    bad = [sample for sample in samples if isinstance(sample, str)]
    filler = (good[0][0] if good else torch.zeros(3, image_size, image_size, dtype=torch.uint8), IGNORED)
    pairs = [sample if isinstance(sample, tuple) else filler for sample in samples]
    images = _stack([image for image, _ in pairs])
    return Batch(images, torch.tensor([label for _, label in pairs]), bad)


def _stack(images: list[torch.Tensor]) -> torch.Tensor:
    """Stack images in their own layout: rearranging takes longer than copying."""
    if images[0].stride(0) == 1:
        return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return torch.stack(images)


def open_splits(root: Path, config: DataConfig, *, seed: int) -> tuple[Split, Split]:
    """Open the training and validation splits.

    Args:
        root: directory of both; of no meaning for synthetic data.
        config: of the data.
        seed: of what is random in the training images.

    Raises:
        ValueError: a split is missing or empty, or their classes differ.
    """
    if config.source == "synthetic":
        return SyntheticSplit(config, train=True, seed=seed), SyntheticSplit(config, train=False, seed=seed)
    train, val = (
        _image_split(root / name, config, transform, seed=seed)
        for name, transform in (
            (config.train_split, TrainTransform(config)),
            (config.val_split, ValTransform(config)),
        )
    )
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        raise ValueError(
            f"the classes of {root / config.train_split} and {root / config.val_split} differ: "
            f"only in {config.train_split}: {_some(only_train)}; only in {config.val_split}: {_some(only_val)}"
        )
    return train, val


def open_validation(root: Path, config: DataConfig, transform: ValTransform) -> Split:
    """Open the validation split alone.

    Args:
        root: as for `open_splits`.
        config: of the data.
        transform: of its images; of no meaning for synthetic data.

    Raises:
        ValueError: it is missing or empty.
    """
    if config.source == "synthetic":
        return SyntheticSplit(config, train=False, seed=0)
    return _image_split(root / config.val_split, config, transform, seed=0)


def _image_split(directory: Path, config: DataConfig, transform: Any, *, seed: int) -> ImageSplit:
    kind = TarShards if config.source == "shards" else ImageTree
    source = kind(directory, max_bytes=config.max_image_bytes)
    return ImageSplit(source, transform, seed=seed, max_pixels=config.max_image_pixels)


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
    )


def loader(
    split: Split,
    order: Sampler[list[SampleKey]],
    *,
    workers: int,
    image_size: int,
    pin_memory: bool,
    timeout: float = 0,
) -> DataLoader[Batch]:
    """Load batches in the given order."""
    make_batch = Shared(partial(collate, image_size=image_size))
    return process_loader(
        split, order, workers=workers, collate=make_batch, pin_memory=pin_memory, timeout=timeout
    )


def process_loader(
    split: Any,
    order: Sampler[list[SampleKey]],
    *,
    workers: int,
    collate: Any,
    pin_memory: bool,
    timeout: float = 0,
) -> DataLoader[Any]:
    """Load what `collate` makes of a split's samples, in the given order.

    Its passes raise `LoadingError` when a loader process has died, or none has sent anything for `timeout` seconds.

    Worker processes are forked from a server that has only imported this: forking a rank that already communicates may
    hang, and importing everything anew takes each worker seconds.
    """
    if workers:
        multiprocessing.set_forkserver_preload([__name__])
        with signals_held(), safe_start():
            resource_tracker.ensure_running()  # unblocks SIGINT and SIGTERM when it starts one (CPython 3.11)
        with signals_held(), safe_start():
            forkserver.ensure_running()
    return WatchedLoader(
        split,
        patience=timeout,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=_begin_loading if workers else None,
        pin_memory=pin_memory,
        # Without one the loader draws from the global generator at every start, and a resume would start once more.
        generator=torch.Generator().manual_seed(0),
    )


def _begin_loading(worker: int) -> None:
    """Prepare a loader process: it ends when its rank has ended, however that came.

    Torch's own watch is for the process that forked it: here the server, which lives as long as what it forked.
    """
    if not sys.warnoptions:  # else they are asked for
        # Of libraries, where a user can do nothing; each process would show its own.
        warnings.filterwarnings("ignore", category=FutureWarning)
    rank = multiprocessing.parent_process()
    assert rank is not None

    def watch() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def processes_ended(*loaders: Iterable[Batch]) -> Iterator[None]:
    """End the processes of loaders after the block.

    A rank ends without Python's ordinary end (`end_process`), and what its processes share with it would be left to a
    process of multiprocessing's, which removes it and says that it was leaked. After a failure that the ranks have not
    agreed on that is left so: others may be waiting for this one.
    """
    try:
        yield
    except JobError:
        _end_processes(loaders)
        raise
    _end_processes(loaders)


def _end_processes(loaders: Iterable[Any]) -> None:
    for loader in loaders:
        iterator = getattr(
            loader, "_iterator", None
        )  # of a DataLoader whose processes go on between its passes
        if iterator is not None:
            pinning = hasattr(
                iterator, "_pin_memory_thread"
            )  # which would wait for what a killed process had begun
            if not pinning:
                _kill(iterator._workers)
            iterator._shutdown_workers()
            _kill(iterator._workers)
            for queue in iterator._index_queues:
                if queue._thread is not None:  # holds semaphores, and was told to end
                    queue._thread.join(timeout=1)
            loader._iterator = None
    gc.collect()  # semaphores are removed with the last object that knows them


def _kill(processes: Iterable[Any]) -> None:
    """End loader processes that may still be starting, deaf to a request; they hold nothing that is missed."""
    for process in processes:
        if process.is_alive():
            process.kill()


def batches(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Make one pass over a loader, whose processes do not get signals of a stop."""
    with signals_held():
        iterator = iter(loader)
    yield from iterator
