"""Open, replace and remove the files of a run, an export or a launch.

A path that the user names may lead through links: people keep `runs/` on another disk that way. A link *found* at the
place of a file, or below a directory of ours, was put there by somebody else and is never followed: reading refuses it,
writing replaces it. Nothing is created under a name that can be foretold, and nothing is removed that this project
did not make. No file's mode is wider than the umask says.
"""

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Final

MiB: Final = 1 << 20
DEFAULT_LIMIT: Final = 64 * MiB
"""Bytes that `read_bytes` and `read_text` accept unless told otherwise."""

_PARTIAL: Final = re.compile(r"\..*\.[0-9a-f]{16}\.partial(\..*)?")


def sync(path: Path) -> None:
    """Write a file's content, or a directory's entries, to the disk before returning.

    Raises:
        OSError: the file system could not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(directory: Path, *names: str) -> Path:
    """Return the path of something below a directory of ours, after checking every step of the way.

    Args:
        directory: which the user named; links on the way to it are followed.
        names: of directories below it and, last, of a file or directory. Each must be a plain name. What does not
            exist yet is fine, and so is a link as the last: the functions that open refuse or replace it.

    Raises:
        ValueError: a name leads elsewhere ("..", "a/b", ""), or a directory on the way is a link.
    """
    path = directory
    for name in names:
        if path != directory and path.is_symlink():
            raise ValueError(_is_a_link(path))
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{name!r} is no name of a file in {directory}")
        path = path / name
    return path


def make_directory(directory: Path, *names: str) -> Path:
    """Create a directory below one of ours, with those on the way, where it does not exist.

    Args:
        directory: which the user named; created too, links on the way to it are followed.
        names: as for `inside`.

    Raises:
        ValueError: a name leads elsewhere, or something on the way is a link.
        OSError: it cannot be created, or is there and no directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for depth in range(1, len(names) + 1):
        path = inside(directory, *names[:depth])
        if path.is_symlink():
            raise ValueError(_is_a_link(path))
        path.mkdir(exist_ok=True)
    return inside(directory, *names)


def open_regular(path: Path, *, follow: bool = False, pipe: bool = False) -> BufferedReader:
    """Open a regular file for reading, without waiting for the writer of a named pipe.

    Args:
        path: of the file.
        follow: whether it may be a link: True for a path that the user named.
        pipe: whether it may be a pipe, which is at its end where nobody holds it open for writing: True for a path
            that the user named and that ``<(command)`` may have made.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is a link, a directory, a named pipe, a device or a socket.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(_is_a_link(path)) from error
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise ValueError(f"{path} is not a regular file") from error
        raise
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or (pipe and stat.S_ISFIFO(mode))):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    os.set_blocking(descriptor, True)
    return open(descriptor, "rb")


def read_bytes(path: Path, *, limit: int = DEFAULT_LIMIT, follow: bool = False, pipe: bool = False) -> bytes:
    """Read a whole regular file.

    Args:
        path: of the file.
        limit: bytes it may have.
        follow: as for `open_regular`.
        pipe: as for `open_regular`.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no regular file, or has more bytes.
    """
    with open_regular(path, follow=follow, pipe=pipe) as file:
        size = os.fstat(file.fileno()).st_size
        # Asked for by its size, since a buffer is made for as many bytes as are asked for.
        content = file.read(size + 1) if size <= limit else b""
        if len(content) > size:  # a pipe, or it has grown
            content += file.read(limit + 1 - len(content))
    if max(size, len(content)) > limit:
        raise ValueError(f"{path} has more than the {_readable_size(limit)} that such a file may have")
    return content


def read_text(path: Path, *, limit: int = DEFAULT_LIMIT, follow: bool = False, pipe: bool = False) -> str:
    """Read a whole regular file as UTF-8; see `read_bytes`.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no regular file, has more bytes, or is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit, follow=follow, pipe=pipe).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


@contextmanager
def replacing(path: Path, *, private: bool = False, executable: bool = False) -> Iterator[Path]:
    """Give a file new content, all or nothing: yield the path to write, then put it in the file's place.

    For libraries that write to a path; else `writing`. The file appears under its name when it is complete and on the
    disk. A full disk, an error or a kill leaves what was there; only a kill leaves the partial file too.

    Args:
        path: of the file; an existing one, or a link, is replaced, and a link's target left alone.
        private: readable by its owner only, whatever the umask says.
        executable: may be run by whom the umask lets read it.

    Yields:
        Path of an empty file beside it, with a random name and the same suffix.

    Raises:
        OSError: it cannot be written, or a directory is in its place; the message names it.
    """
    try:
        partial = _create_beside(path, (0o700 if private else 0o777) & (0o777 if executable else 0o666))
        try:
            yield partial
            sync(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def writing(path: Path, *, private: bool = False, executable: bool = False) -> Iterator[IO[bytes]]:
    """Give a file new content, all or nothing: yield the open file, then put it in place; see `replacing`.

    Raises:
        OSError: it cannot be written, or a directory is in its place.
    """
    with (
        replacing(path, private=private, executable=executable) as partial,
        open(os.open(partial, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "wb") as file,
    ):
        yield file


def write_text(path: Path, text: str, *, private: bool = False, executable: bool = False) -> None:
    """Give a file this content, all or nothing; see `replacing`.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    with writing(path, private=private, executable=executable) as file:
        file.write(text.encode())


def append_text(path: Path, text: str) -> None:
    """Add to the end of a regular file, which is created if there is none.

    Raises:
        ValueError: it is a link, or no regular file.
        OSError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(_is_a_link(path)) from error
        if error.errno == errno.ENXIO:
            raise ValueError(f"{path} is not a regular file") from error
        raise
    with open(descriptor, "wb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a regular file")
        file.write(text.encode())


def open_lock(path: Path) -> int:
    """Open the file of a lock, which is created if there is none; return its descriptor.

    Raises:
        ValueError: it is a link, or no regular file.
        OSError: it can be neither created nor opened.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # of somebody else of the group; but locks over NFS want it open for writing
            descriptor = os.open(path, flags | os.O_RDONLY)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(_is_a_link(path)) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file")
    return descriptor


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a directory with content, all or nothing: yield one to fill, then give it its name.

    Args:
        path: which must not exist; the directories above it are created.

    Yields:
        Path of an empty directory beside it, with a random name.

    Raises:
        FileExistsError: something is at `path`.
        OSError: it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, f"{path} exists already")
    partial = _unused_beside(path)
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        partial.rename(path)
    except BaseException:
        remove_tree(partial)
        raise
    sync(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory that this project made, and what is in it; links in it are removed, not followed.

    Args:
        path: a link, or a file, is removed itself. Nothing happens where nothing is.

    Raises:
        OSError: something cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_partial_files(directory: Path) -> None:
    """Remove the files that a killed `replacing` left in a directory of ours, which nobody else may be writing to.

    Raises:
        OSError: one cannot be removed.
    """
    for path in directory.iterdir():
        if is_partial_file(path.name) and (path.is_symlink() or path.is_file()):
            path.unlink()


def is_partial_file(name: str) -> bool:
    """Tell whether a file's name is one that a killed `replacing` leaves."""
    return bool(_PARTIAL.fullmatch(name))


def _create_beside(path: Path, mode: int) -> Path:
    partial = _unused_beside(path)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode))
    return partial


def _unused_beside(path: Path) -> Path:
    return path.with_name(f".{path.stem[:100]}.{secrets.token_hex(8)}.partial{path.suffix}")


def _is_a_link(path: Path) -> str:
    return f"{path} is a link, which is not followed here: put the file or directory itself in its place"


def _readable_size(size: int) -> str:
    return f"{size // MiB} MiB" if size >= MiB else f"{size} bytes"
