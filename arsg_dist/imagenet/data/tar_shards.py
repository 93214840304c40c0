"""Read images from WebDataset tar shards, at any place through an index.

A split is a directory with ``shard-000000.tar`` …, each a plain tar of ``<number>.jpg`` and ``<number>.cls`` that any
WebDataset reader takes, and beside them:

- ``index.npy``: one record (shard, offset, size, label) per image, so that an image is one read at a known place;
- ``split.json``: classes, and name, size and number of images of every shard;
- ``images.txt``: where each image came from;
- ``SHA256SUMS``: of all of these, for ``sha256sum -c SHA256SUMS``.
"""

import hashlib
import os
import stat
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.decoding import Contents
from arsg_dist.imagenet.data.folder import require_class_names, require_directory
from arsg_dist.safe_io.documents import read_json
from arsg_dist.safe_io.files import MiB, open_regular
from arsg_dist.safe_io.text import printable

INDEX, DESCRIPTION, NAMES, CHECKSUMS = "index.npy", "split.json", "images.txt", "SHA256SUMS"
VERSION = 1
LONGEST_NAME: Final = 4096
"""Bytes that a line of `NAMES` may have, as a path may."""
_LARGEST_DESCRIPTION, _LARGEST_INDEX = 64 * MiB, 4096 * MiB
RECORD = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])


class TarShards:
    """One split written by `arsg-imagenet shard`. Its files may be links.

    Args:
        directory: of the split.
        max_bytes: that an image may have.

    Attributes:
        classes: names, in the order of the labels.
        notes: empty.

    Raises:
        ValueError: the directory holds no such split, or a shard is missing, cut off or of another size.
    """

    def __init__(self, directory: Path, *, max_bytes: int = DataConfig.max_image_bytes) -> None:
        require_directory(directory)
        if not (directory / DESCRIPTION).exists():
            raise ValueError(
                f"data directory {directory} holds no {DESCRIPTION}: write shards with "
                "'arsg-imagenet shard SRC DST', or set data.source to folder for a tree of image files"
            )
        try:
            description = read_json(directory / DESCRIPTION, limit=_LARGEST_DESCRIPTION, follow=True)
            index_sha256 = _sha256_of_index(directory / INDEX)
        except (OSError, ValueError) as error:
            raise ValueError(f"shards in {directory} cannot be used: {error}") from None
        if not isinstance(description, dict):
            raise ValueError(f"shards in {directory} cannot be used: {DESCRIPTION} holds no JSON object")
        if description.get("version") != VERSION:
            raise ValueError(
                f"shards in {directory} have version {printable(description.get('version'), limit=20)} and this "
                f"program reads {VERSION}"
            )
        _require_description(directory, description)
        if index_sha256 != description["index_sha256"]:
            raise ValueError(
                f"{directory / INDEX} does not belong to {DESCRIPTION} or is damaged: shard again"
            )
        self.classes: list[str] = description["classes"]
        require_class_names(self.classes, str(directory / DESCRIPTION))
        self.notes: list[str] = []
        self._paths = [directory / shard["name"] for shard in description["shards"]]
        wrong = [
            message
            for path, shard in zip(self._paths, description["shards"], strict=True)
            if (message := _wrong_size(path, shard["bytes"]))
        ]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(self._paths)} shards in {directory} are not as written; first: {wrong[0]}; "
                f"copy them again ('sha256sum -c {CHECKSUMS}' in that directory shows which)"
            )
        self._digest: str = description["index_sha256"]
        self._index = _index_of(directory, len(self.classes), [s["bytes"] for s in description["shards"]])
        self._directory = directory
        self._max_bytes = max_bytes
        self._files: dict[int, IO[bytes]] = {}

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> tuple[bytes, int]:
        """Return the image, by one read, and its label.

        Raises:
            OSError: the shard cannot be read, or ends before the image does.
            ValueError: the shard is no regular file, or the image too large.
        """
        shard, offset, size, label = (int(field) for field in self._index[index])
        if size > self._max_bytes:
            raise ValueError(f"{size:,} bytes are more than data.max_image_bytes, {self._max_bytes:,}")
        if shard not in self._files:
            self._files[shard] = open_regular(self._paths[shard], follow=True)
        encoded = os.pread(self._files[shard].fileno(), size, offset)
        if len(encoded) != size:
            raise OSError(f"{self._paths[shard]} ends inside the image")
        return encoded, label

    def name(self, index: int) -> str:
        """Return the file that the image was made from, and where it is now."""
        return f"{self._original(index)} (number {index}, in {self._paths[int(self._index[index]['shard'])]})"

    def _original(self, index: int) -> str:
        try:
            with open_regular(self._directory / NAMES, follow=True) as names:
                line = b""
                for _ in range(index + 1):
                    line = names.readline(LONGEST_NAME + 1)
                    if not line.endswith(b"\n"):
                        return "an image"
        except (OSError, ValueError):  # which is no reason to lose the message that the name is for
            return "an image"
        return printable(line.decode(errors="replace").strip(), limit=LONGEST_NAME)

    def contents(self, rank: int, ranks: int) -> Contents:
        """Sum up the images, on rank 0: the index's digest stands for place, size and label of each."""
        if rank:
            return Contents()
        return Contents(len(self), int(self._index["size"].sum()), int(self._digest[:32], 16))

    def fingerprint(self) -> list[str | int]:
        """Return the number of images, the classes and the index's digest."""
        return [len(self), *self.classes, self._digest]

    def __getstate__(self) -> dict[str, Any]:
        # Every loader process opens the files itself, and maps the index instead of getting a copy.
        return {**self.__dict__, "_files": {}, "_index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index = np.load(self._directory / INDEX, mmap_mode="r", allow_pickle=False)

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            file.close()


def _sha256_of_index(path: Path) -> str:
    with open_regular(path, follow=True) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_INDEX:
            raise ValueError(
                f"{path.name} has more than the {_LARGEST_INDEX // MiB} MiB that an index may have"
            )
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_description(directory: Path, description: dict[str, Any]) -> None:
    classes, shards = description.get("classes"), description.get("shards")
    good = (
        isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and isinstance(shards, list)
        and all(
            isinstance(shard, dict)
            # No path: a description from elsewhere must not make the program read other files.
            and isinstance(shard.get("name"), str)
            and Path(shard["name"]).name == shard["name"] == printable(shard["name"])
            and type(shard.get("bytes")) is int
            and 0 <= shard["bytes"] < 2**63
            for shard in shards
        )
        and isinstance(description.get("index_sha256"), str)
    )
    if not good:
        raise ValueError(
            f"shards in {directory} cannot be used: {DESCRIPTION} is not as 'arsg-imagenet shard' writes it"
        )


def _index_of(directory: Path, num_classes: int, sizes: list[int]) -> "np.ndarray[Any, Any]":
    """Read the records, never a pickle, each within its shard."""
    refused = f"shards in {directory} cannot be used: {INDEX}"
    try:
        index: np.ndarray[Any, Any] = np.load(directory / INDEX, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, SyntaxError, TypeError, EOFError, OverflowError) as error:
        raise ValueError(f"{refused} is no array of records: {str(error).splitlines()[0]}") from None
    if index.dtype != RECORD or index.ndim != 1:
        raise ValueError(f"{refused} is no array of records")
    end_of = np.array(sizes, dtype=np.int64)
    if len(index) and not (
        (index["shard"] >= 0).all()
        and (index["shard"] < len(sizes)).all()
        and (index["offset"] >= 0).all()
        and (index["size"] >= 0).all()
        and (index["offset"] <= end_of[index["shard"]] - index["size"]).all()
        and (index["label"] >= 0).all()
        and (index["label"] < num_classes).all()
    ):
        raise ValueError(f"{refused} leads outside the shards or classes")
    return index


def _wrong_size(path: Path, expected: int) -> str | None:
    try:
        found = path.stat()
    except OSError:
        return f"{path.name} is missing"
    if not stat.S_ISREG(found.st_mode):
        return f"{path.name} is not a regular file"
    size = found.st_size
    return None if size == expected else f"{path.name} has {size} bytes instead of {expected}"
