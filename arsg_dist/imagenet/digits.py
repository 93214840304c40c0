"""The data used when none is given: real handwritten digits as a JPEG ImageFolder tree, without a download."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from arsg_dist.safe_io.files import make_directory, new_directory

DIGITS = Path("data/digits")
"""Where a training without `data.root` has them, relative to the current directory."""

_PIXELS = 32


def digits_tree(directory: Path) -> Path:
    """Writes scikit-learn's 1,797 handwritten digits as ``train/<digit>/*.jpg`` and ``val/<digit>/*.jpg``.

    Every fifth image of a digit goes to val (355 of 1,797). The 8×8 scans are enlarged to 32×32 pixels. The tree
    appears under its name only when it is complete; several processes may call this at once.

    Args:
        directory: where the tree is or will be.

    Returns:
        `directory`.
    """
    if directory.is_dir():
        return directory
    try:
        with new_directory(directory) as partial:
            _write(partial)
    except OSError:
        if not directory.is_dir():  # else another process was first
            raise
    return directory


def _write(directory: Path) -> None:
    digits = load_digits()
    seen = [0] * 10
    for scan, digit in zip(digits.images, digits.target, strict=True):
        split = "val" if seen[digit] % 5 == 4 else "train"
        path = make_directory(directory, split, str(digit)) / f"{seen[digit]:04d}.jpg"
        seen[digit] += 1
        grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
        grey.resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC).save(path, quality=95)
