"""A directory of checkpoints in which only complete ones can be seen."""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from arsg_dist.checkpoint.durable import sync
from arsg_dist.engine import Communicator

_NAME = re.compile(r"step-(\d{9,})$")
_SCORE = "score.json"


class CheckpointStore:
    """Checkpoints named ``step-000001234`` in a directory on a file system that all ranks share.

    A checkpoint is written under a name that `latest` does not see, synced, and renamed: after a crash at any moment
    every visible one is complete. The link ``best`` leads to the one with the highest score.

    Args:
        directory: created by the first `save`.
        communicator: of all ranks of the job.
        keep: how many checkpoints to keep, at least 1; older ones are removed after a new one is in place. The one with
            the highest score is kept besides.
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

    def best(self) -> Path | None:
        """Path of the checkpoint with the highest score, the earliest of several; None if none has a score."""
        scores = {
            path: json.loads((path / _SCORE).read_text())
            for path in self.complete()
            if (path / _SCORE).exists()
        }
        return max(scores, key=lambda path: float(scores[path])) if scores else None

    def save(self, step: int, write: Callable[[Path], None], *, score: float | None = None) -> Path:
        """Makes a checkpoint; every rank must call it.

        Args:
            step: updates made so far; names the checkpoint.
            write: writes this rank's part into the directory it is given, which exists.
            score: larger is better (validation accuracy); None for one that was not validated.

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
                for left in self.directory.glob(".*"):  # by a job that was killed
                    _remove(left)
                partial.mkdir(parents=True)
        with self._communicator.fail_together(OSError):
            write(partial)
            if leader and score is not None:
                (partial / _SCORE).write_text(json.dumps(score))
        # What a host wrote to a shared file system may still be in its memory alone, so one rank of each syncs.
        hosts = self._communicator.all_gather_object(socket.gethostname())
        with self._communicator.fail_together(OSError):
            if hosts.index(hosts[self._communicator.rank]) == self._communicator.rank:
                _sync_tree(partial)
        with self._communicator.fail_together(OSError):
            if leader:
                if path.exists():  # the same step again, after a resume
                    path.rename(self.directory / f".{path.name}.replaced")
                partial.rename(path)
                sync(self.directory)
                self._tidy()
        return path

    def _tidy(self) -> None:
        best = self.best()
        if best is not None:
            link = self.directory / ".best"
            link.unlink(missing_ok=True)
            link.symlink_to(best.name)
            target = self.directory / "best"
            if target.is_dir() and not target.is_symlink():  # a copy of the run that followed the link
                target.rename(self.directory / ".best.replaced")
            link.rename(target)
        for old in self.complete()[: -self._keep]:
            if old != best:
                # Renamed first: a job killed while it removes leaves nothing that looks complete.
                old.rename(self.directory / f".{old.name}.removed")
        for left in self.directory.glob(".*"):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
