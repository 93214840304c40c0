"""Decode, crop, resize and normalise images on the GPU, by NVIDIA DALI.

Order and randomness stay this program's: loader processes read the encoded bytes in the order asked for and draw the
same crops and flips as without DALI, functions of (seed, epoch, image). DALI only computes pixels.
"""

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.dataset import Batch, ImageSplit, cannot_decode, process_loader
from arsg_dist.imagenet.data.decoding import UNDECODABLE, ImageSource, decode, open_image
from arsg_dist.imagenet.data.sampler import IGNORED, SampleKey, seeded
from arsg_dist.imagenet.data.transforms import MEAN, STD, train_size, val_resize
from arsg_dist.imagenet.torchvision_compat import v2
from arsg_dist.safe_io.text import printable


def check_dali() -> None:
    """Refuse DALI where it cannot run.

    Raises:
        ImportError: it is not installed.
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("data.loader dali needs a CUDA device and this process sees none: use pillow")
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"data.loader dali needs NVIDIA DALI: pip install 'arsg-dist[dali]', or use pillow ({error})"
        ) from error


@dataclass
class Encoded:
    """An image before it is decoded, and what to make of it.

    Attributes:
        data: uint8, the file's bytes.
        label: of the image; IGNORED where it must not count.
        window: int32 (y, x, height, width): the part to decode, pixels.
        part: float32 (top, left, bottom, right): the part of the window to resize, pixels.
        mirror: whether left and right change places.
        size: height and width to resize to, pixels.
        index: in its split.
    """

    data: np.ndarray[Any, Any]
    label: int
    window: tuple[int, int, int, int]
    part: tuple[float, float, float, float]
    mirror: bool
    size: int
    index: int


class EncodedSplit(Dataset[Any]):
    """The images of a source, encoded, each with its crop.

    Args:
        source: of encoded images.
        config: of the data.
        train: whether to draw the crops of training.
        seed: of these.
    """

    def __init__(self, source: ImageSource, config: DataConfig, *, train: bool, seed: int) -> None:
        self.source = source
        self._config, self._train, self._seed = config, train, seed

    def __getitem__(self, key: SampleKey) -> Encoded | str | None:
        """Return the image, a message if it is none, None for a place to be filled up."""
        epoch, index, counts, batch_epoch = SampleKey(*key)
        if index == IGNORED:
            return None
        try:
            encoded, label = self.source.read(index)
            with (
                open_image(encoded, max_pixels=self._config.max_image_pixels) as image,
                seeded(self._seed, epoch, index),
            ):
                window, part, mirror, size = self._crop(image, batch_epoch)
        except UNDECODABLE as error:
            return cannot_decode(self.source, index, error) if counts else None
        data = np.frombuffer(encoded, dtype=np.uint8)
        return Encoded(data, label if counts else IGNORED, window, part, mirror, size, index)

    def _crop(self, image: Image.Image, epoch: int) -> tuple[Any, Any, bool, int]:
        width, height = image.size
        whole = (0, 0, height, width)
        if not self._train:
            size = self._config.image_size
            short = val_resize(size)
            if self._config.augmentation == "none":
                return whole, tuple(map(float, whole)), False, size
            # torchvision's Resize and CenterCrop, seen from the original image.
            scale = min(width, height) / short
            tall, wide = (max(short, int(short * side / min(width, height))) for side in (height, width))
            top, left = (round((side - size) / 2) for side in (tall, wide))
            return (
                whole,
                (top * scale, left * scale, (top + size) * scale, (left + size) * scale),
                False,
                size,
            )
        size = train_size(self._config, epoch)
        if self._config.augmentation == "none":
            return whole, tuple(map(float, whole)), False, size
        crop = v2.RandomResizedCrop(size).make_params([image])
        mirror = bool(torch.rand(1) < 0.5)  # as RandomHorizontalFlip draws
        window = (crop["top"], crop["left"], crop["height"], crop["width"])
        return window, (0.0, 0.0, float(crop["height"]), float(crop["width"])), mirror, size


@dataclass
class EncodedBatch:
    """Images in the order of their batch, with places filled up.

    Attributes:
        images: of the batch.
        bad: one message per file that is no image.
    """

    images: list[Encoded]
    bad: list[str]

    def arrays(self) -> tuple[list[Any], ...]:
        """Return the pipeline's inputs: data, window, part, mirror, size."""
        return (
            [image.data for image in self.images],
            [np.array(image.window[:2], np.int32) for image in self.images],
            [np.array(image.window[2:], np.int32) for image in self.images],
            [np.array(image.part[:2], np.float32) for image in self.images],
            [np.array(image.part[2:], np.float32) for image in self.images],
            [np.int32(image.mirror) for image in self.images],
            [np.array([image.size, image.size], np.float32) for image in self.images],
        )


class CollateEncoded:
    """Make batches; places without a good image get a copy of one, and IGNORED.

    Args:
        image_size: height and width of the black images in a batch that has no good one.
    """

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size

    def __call__(self, samples: list[Encoded | str | None]) -> EncodedBatch:
        """Return the batch of what `EncodedSplit` returned."""
        good = [sample for sample in samples if isinstance(sample, Encoded)]
        bad = [sample for sample in samples if isinstance(sample, str)]
        filler = Encoded(**{**vars(good[0] if good else self._black()), "label": IGNORED})
        return EncodedBatch([sample if isinstance(sample, Encoded) else filler for sample in samples], bad)

    def _black(self) -> Encoded:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG")
        data = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
        return Encoded(data, IGNORED, (0, 0, 8, 8), (0.0, 0.0, 8.0, 8.0), False, self._image_size, IGNORED)


class DaliLoader:
    """Batches in the given order, their images float32, normalised, on a device.

    Args:
        split: to read from.
        order: of the images.
        config: of the data.
        train: whether to draw the crops of training.
        batch_size: images per batch.
        image_size: as for `CollateEncoded`.
        seed: of the crops.
        device: "cuda" devices decode by hardware or kernels; "cpu" is for tests.
    """

    def __init__(
        self,
        split: ImageSplit,
        order: Sampler[list[SampleKey]],
        *,
        config: DataConfig,
        train: bool,
        batch_size: int,
        image_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._source, self._device, self._max_pixels = split.source, device, config.max_image_pixels
        self._encoded: DataLoader[EncodedBatch] = process_loader(
            EncodedSplit(split.source, config, train=train, seed=seed),
            order,
            workers=config.workers,
            collate=CollateEncoded(image_size),
            # There is nothing to pin: a thread of its own reads the queue, in which a large message may be cut off when
            # a loader process is killed.
            pin_memory=device.type == "cuda",
            timeout=config.timeout,
        )
        self._feed: Iterator[EncodedBatch] = iter(())
        self._under_way: deque[EncodedBatch] = deque()
        self._pipeline = _pipeline(self._next, batch_size, device)

    def _next(self) -> tuple[list[Any], ...]:
        batch = next(self._feed)
        self._under_way.append(batch)
        return batch.arrays()

    def __iter__(self) -> Iterator[Batch]:
        """Make one pass, at a time; loader processes start here, before the first batch."""
        self._feed = iter(self._encoded)
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        copied: torch.cuda.Event | None = None
        while True:
            if copied is not None:
                # `run` gives the memory of the last batch back to DALI, which writes there.
                copied.synchronize()  # type: ignore[no-untyped-call]
            try:
                (images,) = self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
                return
            except RuntimeError as error:
                yield from self._without_pixels(error)
                return
            batch = self._under_way.popleft()
            pixels = torch.utils.dlpack.from_dlpack(images.as_tensor()).clone()
            if self._device.type == "cuda":
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()  # type: ignore[no-untyped-call]
            yield Batch(pixels, torch.tensor([image.label for image in batch.images]), batch.bad)

    def _without_pixels(self, error: RuntimeError) -> Iterator[Batch]:
        """Name the images that Pillow cannot decode either, in empty batches: after an error DALI makes no more.

        The run ends with the names at its next record, on all ranks, as it does with the Pillow loader.
        """
        images = [image for batch in self._under_way for image in batch.images]
        bad = [message for image in images if (message := self._fault(image))]
        if not bad:
            shown = printable(", ".join(self._source.name(image.index) for image in images), limit=5000)
            raise RuntimeError(f"DALI could not decode one of {shown}: {error}") from error
        for batch in chain(self._under_way, self._feed):
            size = batch.images[0].size
            pixels = torch.zeros(len(batch.images), 3, size, size, device=self._device)
            yield Batch(pixels, torch.full((len(batch.images),), IGNORED), [*batch.bad, *bad])
            bad = []

    def _fault(self, image: Encoded) -> str | None:
        if image.label == IGNORED:
            return None
        try:
            decode(image.data.tobytes(), max_pixels=self._max_pixels)
        except UNDECODABLE as error:
            return cannot_decode(self._source, image.index, error)
        return None


def _pipeline(source: Any, batch_size: int, device: torch.device) -> Any:
    from nvidia.dali import Pipeline, fn, types

    gpu = device.type == "cuda"
    pipeline = Pipeline(batch_size=batch_size, num_threads=2, device_id=(device.index or 0) if gpu else None)
    with pipeline:
        data, start, shape, top_left, bottom_right, mirror, size = fn.external_source(
            source=source, num_outputs=7, batch=True
        )
        images = fn.decoders.image_slice(
            data,
            start=start,
            shape=shape,
            axis_names="HW",
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,  # as in decoding.decode
        )
        images = fn.resize(
            images,
            size=size,
            roi_start=top_left,
            roi_end=bottom_right,
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        pipeline.set_outputs(
            fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                mean=[255 * value for value in MEAN],
                std=[255 * value for value in STD],
                output_layout="CHW",
                dtype=types.FLOAT,
            )
        )
    pipeline.build()
    return pipeline
