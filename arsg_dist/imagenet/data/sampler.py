"""Sample images by (seed, epoch) alone, alike on any number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

IGNORED = -1
"""Label of a place in a batch that holds no image of its own and must not count; index of a place without image."""


class SampleKey(NamedTuple):
    """What a place in a batch holds.

    Attributes:
        epoch: pass over the split, from 0; together with seed and index it fixes the augmentation.
        image: its index in the split, or IGNORED.
        counts: False for an image that only fills the batch up: its label becomes IGNORED.
        batch_epoch: epoch of the first image of the global batch; it fixes the size where that changes with the epoch.
    """

    epoch: int
    image: int
    counts: bool = True
    batch_epoch: int = 0


class TrainingSampler(Sampler[list[SampleKey]]):
    """This rank's micro-batches of a run, from a position on.

    A run is one stream of images: the permutation of epoch 0, then that of epoch 1, and so on, each a function of
    (seed, epoch). Image number p of the stream belongs to epoch p // num_images. Every update takes the next
    `batch_size` images, so a batch may reach over the border of two epochs and none is left out: each epoch holds
    every image exactly once. Only the last update of the run may have fewer; it is filled up with images that do
    not count.

    An epoch ends with the first update at or after its last image. The state of the order is one number, `position`:
    nothing has to be read to resume, and the number of ranks need not be the same. (A run keeps its batch size, since
    schedules count updates, and its seed, without which the place means nothing.)

    Args:
        num_images: length of the split.
        epochs: of the run.
        batch_size: images per update over all ranks and accumulation steps, a multiple of both.
        accumulation_steps: micro-batches per update.
        rank: of this process.
        world_size: number of ranks.
        seed: of the permutations.

    Attributes:
        position: images of the stream that earlier updates have used; set it before iterating to resume there.
        updates_per_epoch: num_images / batch_size, which may be fractional.

    Raises:
        ValueError: a batch would hold more than an epoch.
    """

    def __init__(
        self,
        num_images: int,
        *,
        epochs: int,
        batch_size: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        if batch_size > num_images:
            raise ValueError(
                f"batch_size={batch_size} is larger than the training split of {num_images} images"
            )
        self.position = 0
        self.updates_per_epoch = num_images / batch_size
        self._num_images = num_images
        self._end = num_images * epochs
        self._batch_size = batch_size
        self._accumulation_steps = accumulation_steps
        self._parts = accumulation_steps * world_size
        self._rank, self._world_size = rank, world_size
        self._seed = seed

    def after(self, position: int) -> int:
        """Return the position after the update that starts at `position`."""
        return min(position + self._batch_size, self._end)

    def end_of(self, epoch: int) -> int:
        """Return where `epoch` ends, if no batch reaches over its border."""
        return self._num_images * (epoch + 1)

    def updates_until(self, epoch: int, position: int) -> int:
        """Count the updates from `position` to the end of `epoch`."""
        return max(0, -(-(min(self.end_of(epoch), self._end) - position) // self._batch_size))

    def weight(self, position: int) -> float:
        """Return the factor that makes an update's loss a mean over real images.

        Engines average over nominal sizes; this is 1 but for a last update that is filled up.
        """
        return self._batch_size / (self.after(position) - position)

    def __len__(self) -> int:
        return -(-(self._end - self.position) // self._batch_size) * self._accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        permutations: dict[int, torch.Tensor] = {}
        for start in range(self.position, self._end, self._batch_size):
            real = min(self._batch_size, self._end - start)
            needed = (start // self._num_images, (start + real - 1) // self._num_images)
            permutations = {
                epoch: permutations[epoch] if epoch in permutations else self._permutation(epoch)
                for epoch in needed
            }
            for step in range(self._accumulation_steps):
                # Dealt out like cards: what is missing in a last batch is missing evenly on all ranks.
                places = range(step * self._world_size + self._rank, self._batch_size, self._parts)
                yield [
                    SampleKey(epoch, int(permutations[epoch][index]), place < real, needed[0])
                    for place in places
                    for epoch, index in [divmod(start + place % real, self._num_images)]
                ]

    def _permutation(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_of(self._seed, epoch))
        return torch.randperm(self._num_images, generator=generator)


class ValidationSampler(Sampler[list[SampleKey]]):
    """This rank's batches of the validation split: every image on exactly one rank.

    All ranks have equally many batches of equal size, as sharded parameters need (every forward pass gathers them);
    places without an image are filled up with IGNORED.
    """

    def __init__(self, num_images: int, *, batch_size: int, rank: int, world_size: int) -> None:
        per_rank = -(-num_images // world_size)
        self._batches = -(-per_rank // batch_size)
        mine = list(range(rank, num_images, world_size))
        self._indices = mine + [IGNORED] * (self._batches * batch_size - len(mine))
        self._batch_size = batch_size

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self._indices), self._batch_size):
            yield [SampleKey(0, index) for index in self._indices[start : start + self._batch_size]]


def seed_of(*parts: int) -> int:
    """Make a 63-bit seed from non-negative integers, unrelated to that of others."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Start torch's CPU generator from `seed_of(parts)` inside, and restore it."""
    state = torch.default_generator.get_state()
    # Not torch.manual_seed, which would also reseed the GPU's generator: dropout's.
    torch.default_generator.manual_seed(seed_of(*parts))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
