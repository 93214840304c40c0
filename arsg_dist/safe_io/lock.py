"""Hold a directory for one process at a time."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

from arsg_dist.safe_io.documents import parse_json
from arsg_dist.safe_io.files import open_lock, read_text
from arsg_dist.safe_io.text import printable

PATIENCE = 10.0
"""Seconds to wait for a process of this host, which may be ending."""
PATIENCE_ELSEWHERE = 120.0
"""The same for another host, whose lock may be about to be let go."""

_LIMIT: Final = 1024  # bytes of a lock's file
_TRIES: Final = 100  # to open a file that others create and remove

StartOfJob: TypeAlias = tuple[str, int]
"""A batch job, and how often its scheduler has started it again."""


class InUseError(ValueError):
    """Report that another process holds a directory."""


class DirectoryLock:
    """Hold a directory until `close` or the end of this process, whatever ends it.

    The kernel's lock (flock) on a file in the directory counts, not the file: what a killed process leaves keeps nobody
    off. Over NFS version 4 the server lets go of the locks of a host that is gone after its lease, 90 s by default;
    over version 3 when that host is back. A file system without locks holds nobody off.

    Args:
        directory: to hold; created with the first `take`, and removed by `close` if nothing is in it then.
        name: of the file in it.
        job: which start of a batch job this is: an earlier start of the same one is over, though its lock may be left.
    """

    def __init__(self, directory: Path, name: str, *, job: StartOfJob | None = None) -> None:
        self._directory, self._path, self._job = directory, directory / name, job
        self._descriptor: int | None = None
        self._first_try = 0.0
        self._made: list[Path] = []  # the deepest first

    def take(self) -> bool:
        """Take the lock, or tell that another process has it, which may be about to let go: try again soon.

        Raises:
            InUseError: it has not let go since the first try, with what is known of it.
            ValueError: something else is at the file's name.
            OSError: the directory cannot be made.
        """
        self._first_try = self._first_try or time.monotonic()
        while not self._take():
            holder = self._holder()
            if not self._is_over(holder):
                here = holder.get("host", socket.gethostname()) == socket.gethostname()
                if time.monotonic() - self._first_try > (PATIENCE if here else PATIENCE_ELSEWHERE):
                    raise InUseError(self._in_use(holder))
                return False
            self._path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Let go, and remove the file; directories that were made for it, too, where nothing else is in them."""
        if self._descriptor is not None:
            with suppress(OSError):
                if self._is_in_place(self._descriptor):
                    self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None
        with suppress(OSError):
            for made in self._made:
                made.rmdir()
        self._made = []

    def _take(self) -> bool:
        for left in reversed(range(_TRIES)):
            try:
                self._make_directory()
                descriptor = open_lock(self._path)
            except (
                FileNotFoundError,
                FileExistsError,
            ):  # one who lets go has removed the directory meanwhile
                if not left:
                    raise
                continue
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    return True  # what cannot be written to needs no lock
                raise
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError:  # no locks here
                os.close(descriptor)
                self._path.unlink(missing_ok=True)
                return True
            with suppress(FileNotFoundError):
                if self._is_in_place(descriptor):
                    self._descriptor = descriptor
                    self._sign()
                    return True
            os.close(descriptor)  # of a file that the one before has removed
        return False

    def _is_in_place(self, descriptor: int) -> bool:
        return os.path.samestat(os.fstat(descriptor), os.lstat(self._path))

    def _make_directory(self) -> None:
        absent = []
        for directory in (self._directory, *self._directory.parents):
            if directory.exists():
                break
            absent.append(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._made = absent or self._made

    def _sign(self) -> None:
        """Say in the file who holds it; a full disk may keep that from being known."""
        assert self._descriptor is not None
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            **({"job": self._job[0], "restarts": self._job[1]} if self._job else {}),
        }
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(me).encode(), 0)

    def _holder(self) -> dict[str, object]:
        """Read who holds it; nothing where that cannot be told."""
        with suppress(OSError, ValueError):
            found = parse_json(read_text(self._path, limit=_LIMIT), "it")
            if isinstance(found, dict):
                return found
        return {}

    def _is_over(self, holder: dict[str, object]) -> bool:
        restarts = holder.get("restarts")
        return (
            self._job is not None
            and holder.get("job") == self._job[0]
            and isinstance(restarts, int)
            and restarts < self._job[1]
        )

    def _in_use(self, holder: dict[str, object]) -> str:
        who = "another process"
        if {"pid", "host", "since"} <= holder.keys():
            pid, host, since = (printable(holder[key], limit=100) for key in ("pid", "host", "since"))
            who = f"process {pid} on {host}, since {since}"
            if "job" in holder:
                who += f", job {printable(holder['job'], limit=100)}"
        return (
            f"{self._directory} is in use by {who}: wait for its end, or choose another directory. If it is gone "
            f"for good, with its host, remove {self._path}"
        )
