"""Write an ImageFolder tree as tar shards, every image checked on the way."""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from arsg_dist.engine.job import BAD_INPUT, DONE
from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.decoding import UNDECODABLE, decode
from arsg_dist.imagenet.data.folder import ImageTree, read_image, require_directory
from arsg_dist.imagenet.data.tar_shards import (
    CHECKSUMS,
    DESCRIPTION,
    INDEX,
    LONGEST_NAME,
    NAMES,
    RECORD,
    VERSION,
)
from arsg_dist.safe_io.files import new_directory, sync, write_text, writing
from arsg_dist.safe_io.processes import safe_start
from arsg_dist.safe_io.text import printable

BAD_LIST = "bad_images.txt"
BAD_IMAGES = 3
_FIXED_SEED = (
    0  # of the order inside the shards, which mixes the classes for readers that go from start to end
)


@dataclass
class Shard:
    """What one worker is to write, and what it wrote.

    Attributes:
        path: of the tar.
        images: (number, file, label) in the order to write.
        limits: what an image may have: `max_image_pixels` and `max_image_bytes`.
        records: (number, offset, size, label) of each image written.
        bad: "file: reason" of each image left out.
        sha256: of the tar.
        size: of the tar, bytes.
    """

    path: Path
    images: list[tuple[int, str, int]]
    limits: DataConfig
    records: list[tuple[int, int, int, int]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    sha256: str = ""
    size: int = 0


def shard_command(arguments: list[str]) -> int:
    """Run `arsg-imagenet shard`.

    Returns:
        The exit code: 0 done, 2 bad input, 3 there are images that cannot be decoded and --on-bad-image is error.
    """
    parser = argparse.ArgumentParser(
        prog="arsg-imagenet shard",
        description="Writes an ImageFolder tree as WebDataset tar shards and checks that every image decodes.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="directory with one subdirectory per split")
    parser.add_argument(
        "destination", type=Path, metavar="DST", help="directory to make; must not hold anything"
    )
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="(default: train val)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="(default: CPU cores)"
    )
    parser.add_argument(
        "--shard-size", type=int, default=1024, metavar="MIB", help="at most (default: %(default)s)"
    )
    parser.add_argument(
        "--on-bad-image",
        choices=["error", "skip"],
        default="error",
        help="error: list them beside DST and write nothing (default); skip: leave them out and list them in DST",
    )
    for name, what in (("max_image_pixels", "pixels"), ("max_image_bytes", "bytes")):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(DataConfig, name),
            metavar="N",
            help=f"an image of more {what} counts as one that cannot be decoded (default: %(default)s)",
        )
    options = parser.parse_args(arguments)
    try:
        return shard(
            options.source,
            options.destination,
            splits=options.splits,
            workers=options.workers,
            shard_bytes=options.shard_size * 2**20,
            skip_bad=options.on_bad_image == "skip",
            limits=DataConfig(
                max_image_pixels=options.max_image_pixels, max_image_bytes=options.max_image_bytes
            ),
        )
    except (ValueError, OSError) as error:
        print(f"error: {printable(error, limit=5000)}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT


def shard(
    source: Path,
    destination: Path,
    *,
    splits: list[str],
    workers: int,
    shard_bytes: int,
    skip_bad: bool,
    limits: DataConfig | None = None,
) -> int:
    """Write splits as shards; `destination` appears only when it is complete.

    Args:
        source: directory of the splits.
        destination: to make; an empty directory may be there, or a link to one.
        splits: names of directories in `source`.
        workers: processes.
        shard_bytes: that a shard may have, if it holds more than one image.
        skip_bad: whether images that cannot be decoded are left out and listed.
        limits: `max_image_pixels` and `max_image_bytes`; None for those of `DataConfig`.

    Returns:
        0, or 3 where images are bad and not to be skipped.

    Raises:
        ValueError: bad arguments, a split that is no ImageFolder tree, a destination that holds something.
        OSError: something cannot be read or written.
    """
    if workers < 1 or shard_bytes < 1:
        raise ValueError(
            f"--workers and --shard-size must be at least 1, not {workers} and {shard_bytes // 2**20}"
        )
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty directory; choose another DST")
    for split in splits:
        if Path(split).name != split:
            raise ValueError(f"--splits: {split} is no name of a directory in {source}")
        require_directory(source / split)
    limits = limits or DataConfig()
    trees = {split: ImageTree(source / split, max_bytes=limits.max_image_bytes) for split in splits}
    for note in (note for tree in trees.values() for note in tree.notes):
        print(f"note: {note}", file=sys.stderr)  # noqa: T201
    target = Path(os.path.realpath(destination))  # of a link that the user named
    if target.is_dir():
        target.rmdir()
    try:
        with new_directory(target) as partial:
            bad = [
                message
                for split, tree in trees.items()
                for message in _write_split(
                    tree, source / split, partial / split, workers, shard_bytes, limits
                )
            ]
            if bad and not skip_bad:
                raise _BadImagesError(bad)
            _write(partial / BAD_LIST, _lines(bad).encode())
    except _BadImagesError as found:
        listed = destination.with_name(f"{destination.name}.{BAD_LIST}")
        write_text(listed, _lines(found.messages))
        print(  # noqa: T201
            f"error: {len(found.messages)} images cannot be decoded; nothing was written but their list, {listed} "
            "(--on-bad-image skip leaves them out)",
            file=sys.stderr,
        )
        return BAD_IMAGES
    counts = ", ".join(f"{len(tree)} {split}" for split, tree in trees.items())
    left_out = f"; {len(bad)} left out, see {destination / BAD_LIST}" if bad else ""
    print(f"{destination}: {counts} images{left_out}")  # noqa: T201
    return DONE


class _BadImagesError(Exception):
    """Images cannot be decoded and are not to be left out.

    Attributes:
        messages: one per image.
    """

    def __init__(self, messages: list[str]) -> None:
        super().__init__(f"{len(messages)} images")
        self.messages = messages


def _lines(messages: list[str]) -> str:
    return "".join(f"{message}\n" for message in messages)


def _write_split(
    tree: ImageTree, source: Path, directory: Path, workers: int, shard_bytes: int, limits: DataConfig
) -> list[str]:
    directory.mkdir()
    shards = _plan(tree, directory, shard_bytes, limits)
    # Forked from a server without threads that has imported this once, instead of once per worker.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with safe_start():
        forkserver.ensure_running()
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupt) as pool,
        tqdm(total=len(tree), desc=source.name, unit=" images", mininterval=0.5) as bar,
    ):
        futures = {pool.submit(write_shard, shard): position for position, shard in enumerate(shards)}
        try:
            for future in as_completed(futures):
                shards[futures[future]] = future.result()
                bar.update(len(shards[futures[future]].images))
        except BrokenProcessPool:
            raise ValueError(
                "a worker process has ended, killed perhaps, which the kernel does where memory runs out: nothing was "
                "written; fewer --workers need less"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    _describe(tree, source, directory, shards)
    return [message for shard in shards for message in shard.bad]


def _plan(tree: ImageTree, directory: Path, shard_bytes: int, limits: DataConfig) -> list[Shard]:
    order = torch.randperm(len(tree), generator=torch.Generator().manual_seed(_FIXED_SEED)).tolist()
    groups: list[list[tuple[int, str, int]]] = [[]]
    filled = 0
    for number, index in enumerate(order):
        path, label = tree.file(index)
        size = min(_size(path), limits.max_image_bytes)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((number, path, label))
        filled += size
    return [
        Shard(directory / f"shard-{number:06d}.tar", images, limits) for number, images in enumerate(groups)
    ]


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:  # counted as bad when it is read
        return 0


def write_shard(shard: Shard) -> Shard:
    """Write one tar and sync it; every image is decoded to the end first."""
    with writing(shard.path) as file:
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for number, path, label in shard.images:
                try:
                    encoded = read_image(path, shard.limits.max_image_bytes)
                    decode(encoded, max_pixels=shard.limits.max_image_pixels)
                except UNDECODABLE as error:
                    shard.bad.append(printable(f"{path}: {error}", limit=LONGEST_NAME + 500))
                    continue
                except MemoryError:  # the machine's fault, as in training
                    raise ValueError(f"no memory left to decode {path}; fewer --workers need less") from None
                key, suffix = f"{number:08d}", Path(path).suffix.lower().replace("jpeg", "jpg")
                shard.records.append((number, tar.offset + tarfile.BLOCKSIZE, len(encoded), label))
                _add(tar, key + suffix, encoded)
                _add(tar, key + ".cls", str(label).encode())
    shard.sha256, shard.size = hashing.digest.hexdigest(), hashing.size
    return shard


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))


class _HashingFile(io.RawIOBase):
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, block: Any) -> int:
        self.digest.update(block)
        self.size += len(block)
        return self._file.write(block)


def _describe(tree: ImageTree, source: Path, directory: Path, shards: list[Shard]) -> None:
    written = [shard for shard in shards if shard.records]
    if not written:
        raise ValueError(f"not one image in {source} can be decoded; first: {shards[0].bad[0]}")
    for shard in shards:
        if not shard.records:
            shard.path.unlink()
    records = [(position, *record[1:]) for position, shard in enumerate(written) for record in shard.records]
    buffer = io.BytesIO()
    np.save(buffer, np.array(records, dtype=RECORD))
    originals = {number: path for shard in written for number, path, _ in shard.images}
    names = [originals[record[0]] for shard in written for record in shard.records]
    description = {
        "version": VERSION,
        "classes": tree.classes,
        "index_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "shards": [
            {"name": shard.path.name, "bytes": shard.size, "images": len(shard.records)} for shard in written
        ],
    }
    contents = {
        INDEX: buffer.getvalue(),
        NAMES: _lines(
            [printable(Path(name).relative_to(source), limit=LONGEST_NAME) for name in names]
        ).encode(),
        DESCRIPTION: json.dumps(description, indent=1).encode(),
    }
    sums = {shard.path.name: shard.sha256 for shard in written}
    sums |= {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    contents[CHECKSUMS] = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
    for name, content in contents.items():
        _write(directory / name, content)
    sync(directory)


def _write(path: Path, content: bytes) -> None:
    with writing(path) as file:
        file.write(content)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the workers in order
