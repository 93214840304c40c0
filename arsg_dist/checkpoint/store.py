"""A directory of checkpoints in which only complete ones can be seen."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from arsg_dist.checkpoint.durable import sync
from arsg_dist.engine import Communicator

_NAME = re.compile(r"step-(\d{9,})$")
_SCORE = "score.json"
_POLL_SECONDS = 0.1

Memory = dict[tuple[str, int], Tensor]
"""Piece (key, first element) → its copy."""


class CheckpointStore:
    """Checkpoints named ``step-000001234`` in a directory on a file system that all ranks share.

    A checkpoint is written under a name that `latest` does not see, synced, and renamed: after a crash at any moment
    every visible one is complete. The link ``best`` leads to the one with the highest score.

    Args:
        directory: created by the first `save`.
        communicator: of all ranks of the job.
        keep: how many checkpoints to keep, at least 1; older ones are removed after a new one is in place. The one with
            the highest score is kept besides.

    Attributes:
        memory: of the last copy of a state that was saved in the background; for `save_run`.
    """

    def __init__(self, directory: Path, communicator: Communicator, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = directory
        self._communicator = communicator
        self._keep = keep
        self._saving: _Saving | None = None
        self.memory: Memory = {}

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

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        conclude: Callable[[Path], None] | None = None,
        *,
        score: float | None = None,
        wait: bool = True,
    ) -> Path:
        """Makes a checkpoint; every rank must call it. A save under way is finished first.

        Args:
            step: updates made so far; names the checkpoint.
            write: writes this rank's part into the directory it is given, which exists, and syncs it. Runs in a thread.
            conclude: what rank 0 does there when every rank has written. Runs in a thread.
            score: larger is better (validation accuracy); None for one that was not validated.
            wait: return when it is in place; else at once, and `finish` or the next `save` waits.

        Returns:
            The checkpoint's path.

        Raises:
            JobError: on every rank, when writing this one (if waited for) or the one before failed on any (disk full,
                ...); older checkpoints are untouched.
        """
        self.finish()
        path = self.directory / f"step-{step:09d}"
        partial = self.directory / f".{path.name}.partial"
        leader = self._communicator.rank == 0
        with self._communicator.fail_together(OSError):
            if leader:
                for left in self.directory.glob(".*"):  # by a job that was killed
                    _remove(left)
                partial.mkdir(parents=True)

        def put_in_place() -> None:
            if conclude is not None:
                conclude(partial)
            if score is not None:
                (partial / _SCORE).write_text(json.dumps(score))
            for rank in range(self._communicator.world_size):
                (partial / _written(rank)).unlink(missing_ok=True)
            for file in [*partial.iterdir(), partial]:
                sync(file)
            if path.exists():  # the same step again, after a resume
                path.rename(self.directory / f".{path.name}.replaced")
            partial.rename(path)
            sync(self.directory)
            self._tidy()

        self._saving = _Saving(
            partial,
            self._communicator.rank,
            self._communicator.world_size,
            write,
            put_in_place if leader else None,
        )
        if wait:
            self.finish()
        return path

    def finish(self) -> None:
        """Waits until the last `save` is in place; every rank must call it.

        Raises:
            JobError: on every rank, if it failed on any.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            with self._communicator.fail_together(OSError, ValueError):
                saving.join_written()
        except BaseException:
            saving.give_up()
            raise
        with self._communicator.fail_together(OSError, ValueError):
            saving.join_concluded()

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


@dataclass
class _Saving:
    """A checkpoint that threads of the ranks are writing, without a message between them.

    Each rank leaves an empty file when its part is on the disk; rank 0 waits until it sees those of all, or until
    `join_concluded` tells it that they are there.
    """

    directory: Path
    rank: int
    world_size: int
    write: Callable[[Path], None]
    conclude: Callable[[], None] | None
    _failed: BaseException | None = None
    _all_written: threading.Event = field(default_factory=threading.Event)
    _given_up: threading.Event = field(default_factory=threading.Event)
    _own_written: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        # A daemon: a rank that ends because of an error elsewhere does not wait for it.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.write(self.directory)
            (self.directory / _written(self.rank)).touch()
        except OSError as error:
            self._failed = OSError(f"cannot write the checkpoint {self.directory}: {error}")
        except BaseException as error:
            self._failed = error
        finally:
            self._own_written.set()
        if self.conclude is None or self._failed is not None:
            return
        try:
            while not (self._all_written.is_set() or self._seen()):
                if self._given_up.wait(_POLL_SECONDS):
                    return
            self.conclude()
        except BaseException as error:
            self._failed = error

    def _seen(self) -> bool:
        return all((self.directory / _written(rank)).exists() for rank in range(self.world_size))

    def join_written(self) -> None:
        """Waits for this rank's part; raises what went wrong with it."""
        self._own_written.wait()
        if self._failed is not None:
            raise self._failed

    def give_up(self) -> None:
        """Another rank has not written its part: there will be no checkpoint."""
        self._given_up.set()
        self._thread.join()

    def join_concluded(self) -> None:
        """Waits until the checkpoint is in place; to be called when every rank has written. Raises what went wrong."""
        self._all_written.set()
        self._thread.join()
        if self._failed is not None:
            raise self._failed


def _written(rank: int) -> str:
    return f".written-{rank:05d}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
