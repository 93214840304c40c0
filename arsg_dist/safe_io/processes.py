"""The environment of the processes that we start, and the places where compilers keep code."""

import os
import stat
from collections.abc import Mapping, MutableMapping
from pathlib import Path

CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Variable → directory in `private_cache`: compiled code that the next start loads and runs."""


def environment_of_child(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a Python process that we start: modules of its current directory are not imported.

    Args:
        environ: to start from, default `os.environ`.
    """
    return {**(os.environ if environ is None else environ), "PYTHONSAFEPATH": "1"}


def private_cache(environ: Mapping[str, str] | None = None) -> Path:
    """Return the user's own directory for compiled code, created with mode 0700.

    Args:
        environ: variables to read, default `os.environ`: XDG_CACHE_HOME, HOME.

    Raises:
        ValueError: it belongs to another user, others may write to it, or it cannot be created.
    """
    environ = os.environ if environ is None else environ
    base = environ.get("XDG_CACHE_HOME") or os.path.join(
        environ.get("HOME") or os.path.expanduser("~"), ".cache"
    )
    directory = Path(base) / "arsg_dist" / "compiled"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise ValueError(
            f"cannot create {directory} for compiled code: {error}; set XDG_CACHE_HOME"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(
            f"{directory} keeps compiled code that is run later, but others may write to it: remove it, or set "
            "XDG_CACHE_HOME to a directory of your own"
        )
    return directory


def keep_compiled_code_private(environ: MutableMapping[str, str] | None = None) -> None:
    """Have compilers keep their code in `private_cache` instead of a name in /tmp that a neighbour can make first.

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
