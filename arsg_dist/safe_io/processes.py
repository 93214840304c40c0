"""The environment of the processes that we start, and the places where compilers keep code."""

import grp
import os
import pwd
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variable → directory in `private_cache`: compiled code that the next start loads and runs."""


@contextmanager
def safe_start() -> Iterator[None]:
    """Keep Python processes that a library starts meanwhile from importing modules of their current directory.

    The servers of `multiprocessing` are such: they would import ``selectors.py`` of the current directory.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def leave_terminal() -> None:
    """Let this process go of a terminal that is gone: what it writes there would fail, and the process with it."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(file).st_mode):  # isatty() says no of one that is gone
                os.dup2(nothing, file)
    os.close(nothing)


def is_private(directory: Path) -> bool:
    """Tell whether a directory is the user's own and nobody else may put anything into it, or exchange it.

    Args:
        directory: which exists; a link is not private.

    Raises:
        OSError: it cannot be looked at.
    """
    found, above = directory.lstat(), directory.parent.stat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.getuid()
        and not _others_may_write(found)
        and (not _others_may_write(above) or bool(above.st_mode & stat.S_ISVTX))
    )


def _others_may_write(found: os.stat_result) -> bool:
    if found.st_mode & stat.S_IWGRP:
        try:
            user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(found.st_gid)
        except KeyError:
            return True
        # Where every user has a group of their own, of the same name, files are often writable by it.
        if group.gr_name != user.pw_name or set(group.gr_mem) - {user.pw_name}:
            return True
    return bool(found.st_mode & stat.S_IWOTH)


def private_cache(environ: Mapping[str, str] | None = None) -> Path:
    """Return a directory for compiled code that nobody else may write to, created with mode 0700 where it is missing.

    On the machine's own disk, where torch keeps such code too: the code is made for this processor, and compilers lock
    files, which not every shared file system lets them do. Where somebody else has made that name, or the disk cannot
    be written, it is in the user's cache, and where that cannot be either, anew in every process.

    Args:
        environ: variables to read, default `os.environ`: TMPDIR, XDG_CACHE_HOME, HOME.

    Raises:
        ValueError: no directory can be made anywhere.
    """
    environ = os.environ if environ is None else environ
    home = environ.get("HOME") or os.path.expanduser("~")
    places = (
        Path(environ.get("TMPDIR") or tempfile.gettempdir()) / f"arsg_dist-{os.getuid()}",
        Path(environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")) / "arsg_dist-compiled",
    )
    for directory in places:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(directory) and os.access(directory, os.W_OK | os.X_OK):
                return directory
        except OSError:
            pass  # the next
    try:
        directory = Path(tempfile.mkdtemp(prefix="arsg_dist-"))
    except OSError as error:
        raise ValueError(
            f"there is no directory for compiled code: {error}; set {' and '.join(CACHES)} to one of your own"
        ) from error
    warnings.warn(
        f"code compiled by this process is kept in {directory} and not found again by the next: "
        f"{' and '.join(map(str, places))} cannot be written, or can be by others. Set {' and '.join(CACHES)} to a "
        "directory of your own",
        stacklevel=2,
    )
    return directory


def keep_compiled_code_private(environ: MutableMapping[str, str] | None = None) -> None:
    """Have compilers keep their code in `private_cache` instead of a name in /tmp that a neighbour can make first.

    For programs, at their start; a library leaves the environment of the user's program alone.

    Args:
        environ: variables to complete, default `os.environ`; what the user has set stays.

    Raises:
        ValueError: from `private_cache`.
    """
    environ = os.environ if environ is None else environ
    missing = [name for name in CACHES if name not in environ]
    if missing:
        directory = private_cache(environ)
        for name in missing:
            environ[name] = str(directory / CACHES[name])
