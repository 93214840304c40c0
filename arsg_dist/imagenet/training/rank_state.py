"""Save what differs between ranks: random states, and running statistics."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from arsg_dist.checkpoint import SavedRun
from arsg_dist.engine import Communicator, EngineState
from arsg_dist.engine.state import EXTRA, key_of
from arsg_dist.imagenet.data.sampler import seed_of
from arsg_dist.safe_io.text import printable

_RANDOM_STATE_NUMEL = 100_000  # torch's has 5,056 bytes


def seed_rank(seed: int, rank: int, update: int = 0) -> None:
    """Seed this rank's own random numbers (dropout, stochastic depth)."""
    number = seed_of(seed, rank, update, 1)
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def add_rank_state(state: EngineState, modules: dict[str, nn.Module], rank: int) -> None:
    """Add what belongs to this rank alone to a checkpoint.

    Args:
        state: of the engine on this rank.
        modules: name → module whose buffers differ between ranks.
        rank: of this process.
    """
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    name, key, position, has_gauss, cached = legacy
    assert name == "MT19937"
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*key.tolist(), position, has_gauss]),
        "numpy gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    for what, tensor in tensors.items():
        state.add_whole(key_of(EXTRA, _random(rank, what)), tensor)
    for what, buffer in _buffers(modules):
        state.add_whole(key_of(EXTRA, _buffer(rank, what)), buffer)


def load_rank_state(
    saved: SavedRun, modules: dict[str, nn.Module], communicator: Communicator, *, seed: int, update: int
) -> bool:
    """Restore what `add_rank_state` added.

    On another number of ranks there is no rank to continue: running statistics become the mean over the old ranks,
    and random states start from (seed, rank, update).

    Returns:
        Whether the number of ranks is the same, so that the run goes on exactly.

    Raises:
        ValueError: the checkpoint does not have them, or a file is damaged.
    """
    if saved.manifest.world_size != communicator.world_size:
        seed_rank(seed, communicator.rank, update)
        for what, buffer in _buffers(modules):
            for rank in range(saved.manifest.world_size):
                saved.check_shape(EXTRA, _buffer(rank, what), buffer.shape)
            old = [saved.whole(EXTRA, _buffer(rank, what)) for rank in range(saved.manifest.world_size)]
            _copy(buffer, _mean(old))
        return False
    for what, buffer in _buffers(modules):
        saved.check_shape(EXTRA, _buffer(communicator.rank, what), buffer.shape)
        _copy(buffer, saved.whole(EXTRA, _buffer(communicator.rank, what)))
    try:
        _load_random_state(saved, communicator.rank)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
    ) as error:  # of torch, Python and numpy
        raise ValueError(
            f"{saved.where} has a random state of rank {communicator.rank} that is none: {printable(error)}"
        ) from error
    return True


def mean_buffers(saved: SavedRun, name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers of a saved network, of which every rank had its own, as validation averages them.

    There are none of their own in a checkpoint that was made of another program's.

    Args:
        saved: the checkpoint.
        name: of the network in it, see `RunParts.networks`.
        module: of the same buffers.

    Raises:
        ValueError: the checkpoint does not have them, or a file is damaged.
    """
    ranks = range(saved.manifest.world_size)
    found: dict[str, torch.Tensor] = {}
    if not any(extra.startswith(_buffer(0, f"{name}.")) for extra in saved.extras):
        return found
    for what, buffer in module.named_buffers():
        for rank in ranks:
            saved.check_shape(EXTRA, _buffer(rank, f"{name}.{what}"), buffer.shape)
        found[what] = _mean([saved.whole(EXTRA, _buffer(rank, f"{name}.{what}")) for rank in ranks])
    return found


def _load_random_state(saved: SavedRun, rank: int) -> None:
    def stored(what: str) -> torch.Tensor:
        spec = saved.spec(EXTRA, _random(rank, what))
        if spec is not None and spec.numel > _RANDOM_STATE_NUMEL:
            raise ValueError(f"{saved.where} has a random state of {what} that is too large for one")
        return saved.whole(EXTRA, _random(rank, what)).clone()

    torch.set_rng_state(stored("torch"))
    version, *words = stored("python").tolist()
    random.setstate((version, tuple(words), next(iter(stored("python gauss").tolist()), None)))
    *key, position, has_gauss = stored("numpy").tolist()
    cached = float(stored("numpy gauss"))
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, cached))
    if torch.cuda.is_available() and _random(rank, "cuda") in saved.extras:
        torch.cuda.set_rng_state(stored("cuda"))


def _random(rank: int, what: str) -> str:
    return f"rank {rank}, random state of {what}"


def _buffer(rank: int, what: str) -> str:
    return f"rank {rank}, {what}"


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    if not values[0].is_floating_point():
        return values[0]
    return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)


def _buffers(modules: dict[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in modules.items():
        for name, buffer in module.named_buffers():
            yield f"{prefix}.{name}", buffer


@torch.no_grad()
def _copy(buffer: torch.Tensor, value: torch.Tensor) -> None:
    buffer.copy_(value)
