"""Decode images from bytes of any origin."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

from PIL import Image, UnidentifiedImageError

from arsg_dist.imagenet.config import DataConfig

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
"""Of files that are decoded, whatever they are called. Pillow knows many more; one of them starts Ghostscript."""
_MOST_SCANS: Final = 100
UNDECODABLE: Final = (OSError, ValueError)
"""What reading and decoding raise for a file that is no usable image."""
_HTML: Final = "HTML, not an image"
_OTHERS: Final = {
    **dict.fromkeys((b"<!doctype html", b"<html", b"<head", b"<body"), _HTML),
    b"<?xml": "XML, not an image",
    b"<svg": "SVG, not an image of pixels",
    b"<error": "XML, not an image",
    b'{"': "JSON, not an image",
    b"version https://git-lfs": "a Git LFS pointer, not the image: git lfs pull gets it",
    b"\x89png": "PNG, damaged or cut off",
    b"\xff\xd8": "JPEG, damaged or cut off",
}
"""How files begin that are found in place of images, in lower case."""

MODULUS: Final = 1 << 128


def number_of_file(name: str, size: int) -> int:
    """Return a number that tells a file of a split from others, by its name there and its size."""
    digest = hashlib.sha256(f"{size} {name}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:16])


@dataclass(frozen=True)
class Contents:
    """What a split holds, summed up over its files; nothing of where it is.

    Attributes:
        images: how many.
        size: bytes of them all.
        digest: sum of a number of each file's name and size, modulo 2¹²⁸: any share, in any order, can be added.
    """

    images: int = 0
    size: int = 0
    digest: int = 0

    def __add__(self, other: "Contents") -> "Contents":
        return Contents(
            self.images + other.images, self.size + other.size, (self.digest + other.digest) % MODULUS
        )


class ImageSource(Protocol):
    """Encoded images by number, the same on every rank.

    Attributes:
        classes: names, in the order of the labels.
        notes: what was left out, for the user.
    """

    classes: list[str]
    notes: list[str]

    def __len__(self) -> int:
        """Return how many images there are."""

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its label.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no regular file, or too large.
        """

    def name(self, index: int) -> str:
        """Return where the image is, for messages."""

    def contents(self, rank: int, ranks: int) -> Contents:
        """Sum up one rank's share of the files; the sum over the ranks tells one set of files from another."""

    def fingerprint(self) -> list[str | int]:
        """Return what must be equal on all ranks."""


def decode(encoded: bytes, *, max_pixels: int = DataConfig.max_image_pixels) -> Image.Image:
    """Decode an image of any of `FORMATS` to RGB, be it grey, CMYK or a palette.

    Orientation in EXIF is not applied, as in every published ImageNet result.

    Args:
        encoded: of any origin.
        max_pixels: that the image may have; more are refused before any is decoded.

    Raises:
        ValueError: it is no image, incomplete, too large, or one with more than 8 bits per channel, which a conversion
            to RGB would clip.
    """
    with open_image(encoded, max_pixels=max_pixels) as file:
        if file.mode == "RGB":
            file.load()
            return file  # convert() would copy it
        return file.convert("RGB")


@contextmanager
def open_image(encoded: bytes, *, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image of which only the header is read, if that is usable.

    Args:
        encoded: of any origin.
        max_pixels: that the image may have.

    Yields:
        The image, not yet decoded; what decoding raises is a ValueError too.

    Raises:
        ValueError: as `decode`.
    """
    try:
        with warnings.catch_warnings():
            # Damaged EXIF and transparency in palettes are not used, and the number of pixels is ours to judge.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as file:
                _require_usable(file, max_pixels)
                _require_few_scans(file, encoded)
                yield file
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError(_what_it_is(encoded)) from None
    except Exception as error:  # Pillow raises whatever a damaged file leads its decoders to
        raise ValueError(str(error) or type(error).__name__) from error


def _require_usable(image: Any, max_pixels: int) -> None:
    sizes = [image.size]
    if image.format == "TIFF":  # of its tiles, which are decoded as a whole
        sizes.append(tuple(image.tag_v2.get(tag, 0) for tag in (322, 323)))
    for width, height in sizes:
        if width * height > max_pixels:
            raise ValueError(f"{width} × {height} pixels are more than data.max_image_pixels, {max_pixels:,}")
    if image.mode in ("I", "F") or image.mode.startswith("I;") or _deep_colour(image):
        raise ValueError(f"more than 8 bits per channel (mode {image.mode})")


def _require_few_scans(image: Image.Image, encoded: bytes) -> None:
    """Refuse a progressive JPEG of empty scans: each is a pass over all pixels."""
    scans = encoded.count(b"\xff\xda") if image.info.get("progressive") else 0
    if scans > _MOST_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans, where encoders write about 10")


def _deep_colour(image: Any) -> bool:
    """Tell whether Pillow would cut colours of more than 8 bits per channel down."""
    if image.format == "PNG":
        return any(";16" in str(tile.args) for tile in image.tile)
    if image.format == "TIFF":
        return any(bits > 8 for bits in image.tag_v2.get(258, ()))  # BitsPerSample
    if image.format == "PPM":
        return any(isinstance(tile.args, tuple) and tile.args[-1] > 255 for tile in image.tile)
    return False


def _what_it_is(encoded: bytes) -> str:
    if not encoded:
        return "empty file"
    if not encoded.strip(b"\0"):
        return f"{len(encoded):,} zero bytes, not an image: it was never written to the end"
    start = encoded[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, what in _OTHERS.items():
        if start.startswith(beginning):
            return what
    if encoded[4:8] == b"ftyp":
        return f"{encoded[8:12].decode('ascii', 'replace').upper()}, none of {', '.join(FORMATS)}: convert it"
    return f"not an image, or none of {', '.join(FORMATS)}"
