"""What a split's images come from, and how encoded bytes become an image."""

import io
import warnings
from typing import Protocol

from PIL import Image

UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no usable image."""


class ImageSource(Protocol):
    """Encoded images by number, the same on every rank.

    Attributes:
        classes: names, in the order of the labels.
    """

    classes: list[str]

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label.

        Raises:
            OSError: it cannot be read.
        """

    def name(self, index: int) -> str:
        """Where the image is, for messages."""

    def fingerprint(self) -> list[str | int]:
        """What must be equal on all ranks."""


def decode(encoded: bytes) -> Image.Image:
    """The image in RGB, whatever its file is called and holds: grey, CMYK, palette, JPEG or PNG or another format.

    Orientation in EXIF is not applied, as in every published ImageNet result.

    Raises:
        OSError, SyntaxError, ValueError, DecompressionBombError: it is no image, incomplete, or one with more than 8
            bits per channel, which a conversion to RGB would clip.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # damaged EXIF, transparency in palettes: neither is used
        with Image.open(io.BytesIO(encoded)) as file:
            refuse_deep(file)
            if file.mode == "RGB":
                file.load()
                return file  # convert() would copy it
            return file.convert("RGB")


def refuse_deep(image: Image.Image) -> None:
    """Refuses an image that a conversion to RGB would clip.

    Raises:
        ValueError: it has more than 8 bits per channel.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"more than 8 bits per channel (mode {image.mode})")
