"""Random numbers that are functions of what they are for."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int) -> int:
    """A 63-bit seed from non-negative integers; other integers, or another number of them, give an unrelated seed."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Inside, torch's CPU generator starts from `seed_of(parts)`; afterwards it goes on as if it had not."""
    state = torch.default_generator.get_state()
    # Not torch.manual_seed, which would also reseed the GPU's generator: dropout's.
    torch.default_generator.manual_seed(seed_of(*parts))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
