"""Objects that somebody may pickle: harmless ones of their own, and one that does something when it is unpickled."""

from pathlib import Path
from typing import Any


class Own:
    """Of a class that a program keeps in its client state."""

    def __init__(self, x: int) -> None:
        self.x = x


class OwnDictionary(dict[str, Any]):
    """The same, derived from a container."""


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)
