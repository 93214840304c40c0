"""What was written stays, also if the machine loses power."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Has a file's content, or a directory's entries, written to the disk before it returns.

    Raises:
        OSError: the file system could not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
