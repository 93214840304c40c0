"""A directory of checkpoints in which only complete ones can be seen."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from arsg_dist.engine import Communicator

_NAME = re.compile(r"step-(\d{9,})$")


class CheckpointStore:
    """Checkpoints named ``step-000001234`` in a directory on a file system that all ranks share.

    A checkpoint is written under a name that `latest` does not see, synced, and renamed: after a crash at any moment
    the newest visible one is complete.

    Args:
        directory: created by the first `save`.
        communicator: of all ranks of the job.
        keep: how many checkpoints to keep, at least 1; older ones are removed after a new one is in place.
    """

    def __init__(self, directory: Path, communicator: Communicator, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = directory
        self._communicator = communicator
        self._keep = keep

    def complete(self) -> list[Path]:
        """Paths of the complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if _NAME.match(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def latest(self) -> Path | None:
        """Path of the newest complete checkpoint, or None."""
        complete = self.complete()
        return complete[-1] if complete else None

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Makes a checkpoint; every rank must call it.

        Args:
            step: updates made so far; names the checkpoint.
            write: writes this rank's part into the directory it is given, which exists.

        Returns:
            The checkpoint's path.

        Raises:
            JobError: on every rank, when writing failed on any (disk full, ...); older checkpoints are untouched.
        """
        path = self.directory / f"step-{step:09d}"
        partial = self.directory / f".{path.name}.partial"
        leader = self._communicator.rank == 0
        with self._communicator.fail_together(OSError):
            if leader:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with self._communicator.fail_together(OSError):
            write(partial)
        with self._communicator.fail_together(OSError):
            if leader:
                _sync_tree(partial)
                if path.exists():  # the same step again, after a resume
                    shutil.rmtree(path)
                partial.rename(path)
                _sync(self.directory)
                for old in self.complete()[: -self._keep]:
                    shutil.rmtree(old)
        return path


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
