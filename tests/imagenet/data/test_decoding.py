"""Images as large photo collections have them, and images that are none."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.builtin import SyntheticSplit
from arsg_dist.imagenet.data.dataset import open_splits
from arsg_dist.imagenet.data.decoding import decode
from arsg_dist.imagenet.data.sampler import IGNORED, SampleKey

RED = (200, 30, 40)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(mode: str) -> Image.Image:
    image = Image.new("RGB", (40, 30), RED)
    return image.quantize(8) if mode == "P" else image.convert(mode)


KINDS = {
    "RGB JPEG": encoded(plain("RGB"), "JPEG"),
    "CMYK JPEG": encoded(plain("CMYK"), "JPEG"),
    "PNG": encoded(plain("RGB"), "PNG"),
    "PNG with alpha": encoded(plain("RGBA"), "PNG"),
    "palette PNG with transparency": encoded(plain("P"), "PNG", transparency=b"\x00\x80"),
    "GIF": encoded(plain("P"), "GIF"),
    "damaged EXIF": encoded(plain("RGB"), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\x81" * 30),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_colours_survive_every_kind_of_file(kind: str) -> None:
    """Catches inverted CMYK, a format guessed from the file's name, and a warning per image."""
    image = decode(KINDS[kind])
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image).astype(int) - RED).max() < 12


def test_grey_images_get_three_equal_channels() -> None:
    """Catches tensors of one channel."""
    pixels = np.asarray(decode(encoded(plain("L"), "JPEG")))
    assert pixels.shape == (30, 40, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_sixteen_bits_are_refused_instead_of_clipped() -> None:
    """Catches images that a conversion to 8 bits turns white."""
    deep = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode(encoded(deep, "PNG"))


@pytest.mark.parametrize("content", [b"", b"no image", KINDS["RGB JPEG"][:300], KINDS["PNG"][:60]])
def test_what_is_no_whole_image_raises(content: bytes) -> None:
    """Catches the grey lower half of a truncated file."""
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decode(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty file"),
        (bytes(2000), "2,000 zero bytes"),
        (b"\n <!DOCTYPE HTML><p>404", "HTML, not an image"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>NoSuchKey', "XML, not an image"),
        (b'{"error": "rate limit"}', "JSON, not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "a Git LFS pointer.*git lfs pull"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "AVIF, none of JPEG, PNG.*convert it"),
        (KINDS["PNG"][:12], "PNG, damaged or cut off"),
        (b"8BPS\0\1", "not an image, or none of JPEG"),
    ],
)
def test_what_is_found_in_place_of_an_image_is_named(content: bytes, said: str) -> None:
    """Catches "cannot identify image file <_io.BytesIO object>", of which nobody knows what to do."""
    with pytest.raises(ValueError, match=said):
        decode(content)


def test_synthetic_images_are_the_same_in_every_process_and_touch_no_disk() -> None:
    """Catches measurements of other images on every rank or of larger batches, and labels outside the classes."""
    config = DataConfig(source="synthetic", image_size=24, synthetic_images=50, synthetic_classes=7)
    train, val = open_splits(Path("/does/not/exist"), config, seed=3)
    assert isinstance(train, SyntheticSplit)
    assert len(train) == len(val) == 50
    first, again = train[SampleKey(0, 20)], open_splits(Path(), config, seed=3)[0][SampleKey(4, 20)]
    assert isinstance(first, tuple)
    assert isinstance(again, tuple)
    assert first[0].shape == (3, 24, 24)
    assert (
        first[0].dtype == torch.uint8
    )  # what other sources send through shared memory, a quarter of float32
    assert torch.equal(first[0], again[0])
    assert first[1] == 6
    assert train[SampleKey(0, 20, counts=False)][1] == IGNORED  # type: ignore[index]


def test_sources_need_what_they_read() -> None:
    """Catches a directory that synthetic data silently ignores, and shards from nowhere."""
    with pytest.raises(ValueError, match=r"leave data\.root out"):
        DataConfig(source="synthetic", root="/data")
    with pytest.raises(ValueError, match=r"needs data\.root"):
        DataConfig(source="shards")


@pytest.mark.slow
def test_real_photos_decode() -> None:
    """Catches kinds of files in ImageNet that generated ones do not show."""
    archive = Path(
        os.environ.get(
            "ARSG_IMAGENET_SAMPLE",
            Path(__file__).resolve().parents[4] / "shared" / "data" / "imagenet-sample-200.tar",
        )
    )
    if not archive.is_file():
        pytest.skip(f"{archive} is not there; ARSG_IMAGENET_SAMPLE names a tar of ImageNet's photos")
    with tarfile.open(archive) as tar:
        members = [tar.extractfile(member) for member in tar if member.name.endswith(".JPEG")]
        photos = [file.read() for file in members if file]
    assert len(photos) >= 100
    for photo in photos:
        image = decode(photo)
        assert image.mode == "RGB"
        assert min(image.size) > 10
