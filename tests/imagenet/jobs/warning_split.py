"""A library that warns of what it will change, also in loader processes."""

import warnings
from typing import Any


def warn(text: str) -> None:
    """Warn as torch does, after which Python forgets what it has shown."""
    with warnings.catch_warnings():
        warnings.warn(f"FutureWarning {text}", FutureWarning, stacklevel=1)


class WarningSplit:
    """A split that warns of each image, where it is read."""

    def __init__(self, split: Any) -> None:
        self._split = split

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for while it is unpickled
            raise AttributeError(name)
        return getattr(self._split, name)

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, key: Any) -> Any:
        warn("in a loader process")
        return self._split[key]
