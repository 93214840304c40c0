"""Text from a file, as it may be shown on a terminal or put into a message."""

import unicodedata
from typing import Final

_HIDDEN: Final = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def printable(text: object, *, limit: int = 500) -> str:
    """Return text on one line without anything that steers a terminal or hides what is written.

    Args:
        text: of any origin; converted with `str`.
        limit: characters to keep; the rest becomes "…".

    Returns:
        The text with control, format and line-breaking characters written as Python escapes.
    """
    shown = str(text)
    cut = len(shown) > limit
    safe = "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _HIDDEN
        else character
        for character in shown[:limit]
    )
    return safe + "…" if cut else safe


def printable_lines(text: object, *, limit: int = 10_000) -> str:
    """Return text of several lines, each as `printable` gives it.

    Args:
        text: of any origin; converted with `str`.
        limit: characters of each line to keep.
    """
    return "\n".join(printable(line, limit=limit) for line in str(text).split("\n"))
