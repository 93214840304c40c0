"""The data used when none is given: real handwritten digits as a JPEG ImageFolder tree, without a download."""

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

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
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.uname().nodename}.{os.getpid()}")
    digits = load_digits()
    seen = [0] * 10
    for scan, digit in zip(digits.images, digits.target, strict=True):
        split = "val" if seen[digit] % 5 == 4 else "train"
        path = partial / split / str(digit) / f"{seen[digit]:04d}.jpg"
        seen[digit] += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
        grey.resize((_PIXELS, _PIXELS), Image.Resampling.BICUBIC).save(path, quality=95)
    try:
        partial.rename(directory)
    except OSError:  # another process was first
        shutil.rmtree(partial)
        if not directory.is_dir():
            raise
    return directory
