"""Read tokens in the format of the track's FineWeb shards, and make shards of synthetic ones.

A shard is a header of 256 int32 (the number 20240520, the version 1, the number of tokens, zeros) and tokens as uint16,
all little-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAGIC, VERSION, HEADER = 20_240_520, 1, 256


def read_shard(path: Path) -> Tensor:
    """Return the tokens of a file, uint16.

    Raises:
        ValueError: it is no such file, or not a whole one.
    """
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", min(HEADER, size // 4))
    if len(header) < HEADER or header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path} is no shard of tokens: its header must begin with {MAGIC}, {VERSION}")
    if size != 4 * HEADER + 2 * int(header[2]):
        raise ValueError(
            f"{path} says that it has {header[2]} tokens, but is {size} bytes long: copy it again"
        )
    return torch.from_numpy(np.fromfile(path, "<u2", offset=4 * HEADER))


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write such a file."""
    header = np.zeros(HEADER, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def shards(folder: Path, split: str) -> list[Path]:
    """Return the files `*_SPLIT_*.bin` of a folder, in order of their names.

    Raises:
        ValueError: there are none.
    """
    found = sorted(folder.glob(f"*_{split}_*.bin"))
    if not found:
        raise ValueError(
            f"{folder} has no file *_{split}_*.bin: see benchmarks/nanogpt/README.md for the data"
        )
    return found


class Batches:
    """The updates' tokens: one after another, each used once; what is left of a file at its end is left out.

    Args:
        paths: files of tokens.
        tokens: per update, over all ranks.
        time: length of a sequence.
        rank: of this process; it gets its part of each update's tokens.
        ranks: how many there are.

    Raises:
        ValueError: the ranks cannot share an update's tokens in whole sequences.
    """

    def __init__(self, paths: list[Path], tokens: int, time: int, rank: int = 0, ranks: int = 1) -> None:
        if tokens % (time * ranks):
            raise ValueError(f"{tokens} tokens an update are no whole sequences of {time} on {ranks} ranks")
        self._paths, self._tokens, self._time, self._rank, self._ranks = paths, tokens, time, rank, ranks

    def after(self, updates: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what comes after so many updates: tokens and those that follow them, int64 (sequences, time).

        Raises:
            ValueError: there are no more.
        """
        own = self._tokens // self._ranks
        for path in self._paths:
            shard = read_shard(path)
            # The token after an update's last one must be there, too; the track's loader wants one more than that.
            inside = max(0, -(-(len(shard) - self._tokens - 1) // self._tokens))
            if updates >= inside:
                updates -= inside
                continue
            for update in range(updates, inside):
                begin = update * self._tokens + self._rank * own
                part = shard[begin : begin + own + 1].to(torch.int64)
                yield part[:-1].view(-1, self._time), part[1:].view(-1, self._time)
            updates = 0
        raise ValueError(f"the {len(self._paths)} files of tokens are used up: fewer --steps, or more files")


def write_synthetic(folder: Path, vocabulary: int, tokens: int, files: int = 2) -> None:
    """Write shards that can be learned: every second token or so follows from the one before, the others are Zipf's."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    follows = generator.permutation(vocabulary)
    chances = 1 / np.arange(2, vocabulary + 2)
    names = [f"synthetic_train_{number:06}.bin" for number in range(1, files + 1)] + [
        "synthetic_val_000000.bin"
    ]
    for name in names:
        drawn = generator.choice(vocabulary, tokens, p=chances / chances.sum())
        places = np.arange(tokens)
        free = (generator.random(tokens) < 0.5) | (places == 0)
        after = places - np.maximum.accumulate(
            np.where(free, places, 0)
        )  # how long ago the last free one was
        for distance in range(1, after.max() + 1):
            bound = places[after == distance]
            drawn[bound] = follows[drawn[bound - 1]]
        write_shard(folder / name, drawn)
