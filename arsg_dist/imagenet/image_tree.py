"""Images as files: one directory per class."""

from pathlib import Path

from arsg_dist.imagenet.torchvision_compat import torchvision


class ImageTree:
    """One split of an ImageFolder tree.

    Args:
        directory: with one subdirectory per class.

    Raises:
        ValueError: the directory is missing or has no images, or a class in it has none.
    """

    def __init__(self, directory: Path) -> None:
        require_directory(directory)
        try:
            folder = torchvision.datasets.ImageFolder(str(directory))
        except FileNotFoundError as error:  # torchvision's word for no classes and for classes without images
            hint = "; it holds tar shards: set data.source to shards" if list(directory.glob("*.tar")) else ""
            raise ValueError(
                f"data directory {directory} is not a usable ImageFolder tree: {error}{hint}"
            ) from None
        self.classes: list[str] = folder.classes
        self._samples: list[tuple[str, int]] = folder.samples

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of a file and its class's number."""
        path, label = self._samples[index]
        return Path(path).read_bytes(), label

    def file(self, index: int) -> tuple[str, int]:
        """Path and label of an image."""
        return self._samples[index]

    def name(self, index: int) -> str:
        """The file's path."""
        return self._samples[index][0]

    def fingerprint(self) -> list[str | int]:
        """The number of images and the classes."""
        return [len(self._samples), *self.classes]


def require_directory(directory: Path) -> None:
    """Refuses a split that is not there, and says what is.

    Raises:
        ValueError: not a directory.
    """
    if directory.is_dir():
        return
    parent = directory.parent
    siblings = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    raise ValueError(
        f"data directory {directory} does not exist"
        + (f"; {parent} has {', '.join(siblings)}" if siblings else "")
    )
