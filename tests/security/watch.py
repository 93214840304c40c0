"""What the interpreter does while input of a stranger is read: processes, imports, files opened for writing."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PROCESSES = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
)
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "shutil.rmtree",
)
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is None:
        return
    if event in _PROCESSES or event in _CHANGES or event.startswith(("socket.connect", "ctypes.dlopen")):
        _seen.append(f"{event} {arguments}")
    elif event == "import":
        if not str(arguments[0]).startswith("encodings."):
            _seen.append(f"import {arguments[0]}")
    elif event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
            _seen.append(f"open {path!r} for writing")


sys.addaudithook(_hook)  # which stays: there is no way to take one back


@contextmanager
def nothing_happens() -> Iterator[None]:
    """Fail if, inside, a process is started, a module imported, a connection made or a file changed."""
    global _seen
    _seen, seen = [], []
    try:
        yield
    finally:
        seen, _seen = _seen, None
    assert not seen, seen
