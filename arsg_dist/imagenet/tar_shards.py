"""Images in few large files: WebDataset tar shards, read at any place through an index.

A split is a directory with ``shard-000000.tar`` …, each a plain tar of ``<number>.jpg`` and ``<number>.cls`` that any
WebDataset reader takes, and beside them:

- ``index.npy``: one record (shard, offset, size, label) per image, so that an image is one read at a known place;
- ``split.json``: classes, and name, size and number of images of every shard;
- ``images.txt``: where each image came from;
- ``SHA256SUMS``: of all of these, for ``sha256sum -c SHA256SUMS``.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from arsg_dist.imagenet.image_tree import require_directory

INDEX, DESCRIPTION, NAMES, CHECKSUMS = "index.npy", "split.json", "images.txt", "SHA256SUMS"
VERSION = 1
RECORD = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])


class TarShards:
    """One split written by `arsg-imagenet shard`.

    Args:
        directory: of the split.

    Raises:
        ValueError: the directory holds no such split, or a shard is missing, cut off or of another size.
    """

    def __init__(self, directory: Path) -> None:
        require_directory(directory)
        if not (directory / DESCRIPTION).is_file():
            raise ValueError(
                f"data directory {directory} holds no {DESCRIPTION}: write shards with "
                "'arsg-imagenet shard SRC DST', or set data.source to folder for a tree of image files"
            )
        try:
            description: dict[str, Any] = json.loads((directory / DESCRIPTION).read_text())
            index_bytes = (directory / INDEX).read_bytes()
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"shards in {directory} cannot be used: {error}") from None
        if not isinstance(description, dict):
            raise ValueError(f"shards in {directory} cannot be used: {DESCRIPTION} holds no JSON object")
        if description.get("version") != VERSION:
            raise ValueError(
                f"shards in {directory} have version {description.get('version')} and this program reads {VERSION}"
            )
        _require_description(directory, description)
        if hashlib.sha256(index_bytes).hexdigest() != description["index_sha256"]:
            raise ValueError(
                f"{directory / INDEX} does not belong to {DESCRIPTION} or is damaged: shard again"
            )
        self.classes: list[str] = description["classes"]
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
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> tuple[bytes, int]:
        """The image in one read.

        Raises:
            OSError: the shard cannot be read, or ends before the image does.
        """
        shard, offset, size, label = (int(field) for field in self._index[index])
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY)
        encoded = os.pread(self._descriptors[shard], size, offset)
        if len(encoded) != size:
            raise OSError(f"{self._paths[shard]} ends inside the image")
        return encoded, label

    def name(self, index: int) -> str:
        """The file the image was made from, and where it is now."""
        with (self._directory / NAMES).open() as names:
            original = next((line for number, line in enumerate(names) if number == index), "").strip()
        return f"{original} (number {index}, in {self._paths[int(self._index[index]['shard'])]})"

    def fingerprint(self) -> list[str | int]:
        """The number of images, the classes and the index."""
        return [len(self), *self.classes, self._digest]

    def __getstate__(self) -> dict[str, Any]:
        # Every loader process opens the files itself, and maps the index instead of getting a copy.
        return {**self.__dict__, "_descriptors": {}, "_index": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index = np.load(self._directory / INDEX, mmap_mode="r")

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)


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
            and Path(shard["name"]).name == shard["name"]
            and isinstance(shard.get("bytes"), int)
            for shard in shards
        )
        and isinstance(description.get("index_sha256"), str)
    )
    if not good:
        raise ValueError(
            f"shards in {directory} cannot be used: {DESCRIPTION} is not as 'arsg-imagenet shard' writes it"
        )


def _index_of(directory: Path, num_classes: int, sizes: list[int]) -> "np.ndarray[Any, Any]":
    """The records, never a pickle, each within its shard."""
    refused = f"shards in {directory} cannot be used: {INDEX}"
    try:
        index: np.ndarray[Any, Any] = np.load(directory / INDEX, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, SyntaxError, TypeError, EOFError) as error:
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
        size = path.stat().st_size
    except OSError:
        return f"{path.name} is missing"
    return None if size == expected else f"{path.name} has {size} bytes instead of {expected}"
