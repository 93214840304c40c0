"""Random numbers that are functions of what they are for."""

import numpy as np


def seed_of(*parts: int) -> int:
    """A 63-bit seed from non-negative integers; other integers, or another number of them, give an unrelated seed."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)
