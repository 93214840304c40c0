"""Read images from files: an ImageFolder tree, one directory per class."""

import os
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.decoding import MODULUS, Contents, number_of_file
from arsg_dist.safe_io.files import read_bytes
from arsg_dist.safe_io.text import printable

EXTENSIONS: Final = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of files that are images, as torchvision's ImageFolder has them; what they hold may be another kind."""

_STATS_AT_ONCE: Final = 8


class ImageTree:
    """One split of an ImageFolder tree.

    Classes and images may be links. Hidden files and directories (``.ipynb_checkpoints``) are left out.

    Args:
        directory: with one subdirectory per class.
        max_bytes: that a file may have.

    Attributes:
        classes: names of the directories, sorted.
        notes: what was left out, for the user.

    Raises:
        ValueError: the directory is missing or has no images, a class in it has none or a name that is no line of
            text, or links lead round in it.
    """

    def __init__(self, directory: Path, *, max_bytes: int = DataConfig.max_image_bytes) -> None:
        require_directory(directory)
        found = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
        self.classes: list[str] = [name for name in found if not name.startswith(".")]
        require_class_names(self.classes, str(directory))
        hidden = [name for name in found if name.startswith(".")]
        self.notes = [
            f"hidden directories are no classes: {directory} has {printable(', '.join(hidden))}"
        ] * bool(hidden)
        self._max_bytes = max_bytes
        self._root = os.fspath(directory)
        self._samples: list[tuple[str, int]] = []
        empty = []
        for label, name in enumerate(self.classes):
            files = list(_images(directory / name))
            self._samples += [(file, label) for file in files]
            empty += [] if files else [name]
        if empty or not self.classes:
            what = f"no image for the classes {', '.join(empty[:10])}" if empty else "no directory of a class"
            hint = (
                "; it holds tar shards: set data.source to shards"
                if any(path.suffix == ".tar" for path in directory.iterdir())
                else f"; images end in {', '.join(EXTENSIONS)}"
            )
            raise ValueError(
                f"data directory {directory} is not a usable ImageFolder tree: it has {what}{hint}"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the bytes of a file and its class's number."""
        path, label = self._samples[index]
        return read_image(path, self._max_bytes), label

    def file(self, index: int) -> tuple[str, int]:
        """Return path and label of an image."""
        return self._samples[index]

    def name(self, index: int) -> str:
        """Return the file's path."""
        return self._samples[index][0]

    def contents(self, rank: int, ranks: int) -> Contents:
        """Sum up one rank's share of the files, by number of the class, name in it, and size."""
        samples = self._samples[rank::ranks]
        # Threads, since a parallel file system takes its time for each.
        with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
            parts = pool.map(
                self._contents, (samples[index::_STATS_AT_ONCE] for index in range(_STATS_AT_ONCE))
            )
            return sum(parts, start=Contents())

    def _contents(self, samples: list[tuple[str, int]]) -> Contents:
        begins = [len(os.path.join(self._root, name, "")) for name in self.classes]
        total, digest = 0, 0
        for path, label in samples:
            size = _size(path)
            total += size
            digest += number_of_file(f"{label}/{path[begins[label] :]}", size)
        return Contents(len(samples), total, digest % MODULUS)

    def fingerprint(self) -> list[str | int]:
        """Return the number of images and the classes."""
        return [len(self._samples), *self.classes]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # gone, or a link to nothing: said when it is read
        return -1


def read_image(path: str, max_bytes: int) -> bytes:
    """Read an image file; a tree of links is a usual way to make a subset.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or too large.
    """
    try:
        return read_bytes(Path(path), limit=max_bytes, follow=True)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise ValueError(f"{reason} (data.max_image_bytes)" if "more than" in reason else reason) from None


def require_class_names(names: Iterable[str], where: str) -> None:
    """Refuse names of classes that are no single line of classes.txt.

    Raises:
        ValueError: one is empty, or has control or line-breaking characters or bytes that are no text.
    """
    for name in names:
        if not name or any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
            raise ValueError(
                f"{where} has a class named '{printable(name, limit=100)}', which is no line of text: rename it"
            )


def require_directory(directory: Path) -> None:
    """Refuse a split that is not there, and say what is.

    Raises:
        ValueError: not a directory.
    """
    if directory.is_dir():
        return
    parent = directory.parent
    siblings = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    above = parent.parent / directory.name
    hint = f"; {parent} has {', '.join(siblings[:20])}" if siblings else ""
    if above.is_dir():  # data.root names a split
        hint = f"; did you mean data.root {parent.parent}, which has {above.name}?"
    raise ValueError(f"data directory {directory} does not exist{hint}")


def _images(directory: Path) -> Iterator[str]:
    """Find the images of a class in ImageFolder's order, which resumes rely on."""
    seen: set[tuple[int, int]] = set()
    below: list[tuple[str, list[str]]] = []
    for root, inner, files in os.walk(directory, followlinks=True):
        found = os.stat(root)
        if (found.st_dev, found.st_ino) in seen:
            raise ValueError(f"links lead to {root} a second time: remove them, or no image would count once")
        seen.add((found.st_dev, found.st_ino))
        inner[:] = [name for name in inner if not name.startswith(".")]
        below.append((root, files))
    for root, files in sorted(below):
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS):
                yield os.path.join(root, name)
