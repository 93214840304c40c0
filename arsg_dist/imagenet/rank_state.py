"""What differs between ranks and belongs to a checkpoint: random states, and batch norm's running statistics."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from arsg_dist.engine import Communicator
from arsg_dist.imagenet.seeding import seed_of

_RANDOM, _BUFFERS = "random", "buffers"


def seed_rank(seed: int, rank: int, update: int = 0) -> None:
    """Gives this rank random numbers of its own (dropout, stochastic depth)."""
    number = seed_of(seed, rank, update, 1)
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def save_rank_state(directory: Path, modules: dict[str, nn.Module], rank: int) -> None:
    """Writes this rank's file of a checkpoint.

    Args:
        directory: of the checkpoint.
        modules: name → module whose buffers differ between ranks.
        rank: of this process.

    Raises:
        OSError: it cannot be written.
    """
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    state: dict[str, Any] = {
        _RANDOM: {
            "torch": torch.get_rng_state(),
            "python": (version, list(words), gauss),
            "numpy": (legacy[0], legacy[1].tolist(), *map(float, legacy[2:])),
        },
        _BUFFERS: {name: buffer.cpu() for name, buffer in _buffers(modules)},
    }
    if torch.cuda.is_available():
        state[_RANDOM]["cuda"] = torch.cuda.get_rng_state()
    try:
        torch.save(state, directory / _name(rank))
    except RuntimeError as error:  # how torch's writer says that the disk is full
        raise OSError(f"cannot write {directory / _name(rank)}: {str(error).splitlines()[0]}") from error


def load_rank_state(
    directory: Path, modules: dict[str, nn.Module], communicator: Communicator, *, seed: int, update: int
) -> bool:
    """Restores what `save_rank_state` wrote.

    On another number of ranks there is no rank to continue: running statistics become the mean over the old ranks,
    and random states start from (seed, rank, update).

    Returns:
        Whether the number of ranks is the same, so that the run goes on exactly.

    Raises:
        ValueError: the checkpoint has no such files.
    """
    written = sorted(directory.glob("rank-*.pt"))
    if not written:
        raise ValueError(
            f"{directory} holds no rank-*.pt: it was not written by this version of arsg-imagenet"
        )
    if len(written) != communicator.world_size:
        seed_rank(seed, communicator.rank, update)
        states = [torch.load(path, map_location="cpu", weights_only=True)[_BUFFERS] for path in written]
        _set_buffers(modules, {name: _mean([state[name] for state in states]) for name in states[0]})
        return False
    state = torch.load(directory / _name(communicator.rank), map_location="cpu", weights_only=True)
    _set_buffers(modules, state[_BUFFERS])
    saved = state[_RANDOM]
    torch.set_rng_state(saved["torch"])
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words), gauss))
    name, key, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), int(position), int(has_gauss), cached))
    if torch.cuda.is_available() and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"])
    return True


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    if not values[0].is_floating_point():
        return values[0]
    return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)


def _buffers(modules: dict[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in modules.items():
        for name, buffer in module.named_buffers():
            yield f"{prefix}.{name}", buffer


@torch.no_grad()
def _set_buffers(modules: dict[str, nn.Module], values: dict[str, torch.Tensor]) -> None:
    for name, buffer in _buffers(modules):
        buffer.copy_(values[name])
