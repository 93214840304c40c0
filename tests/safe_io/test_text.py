"""Text from files, as a terminal gets it."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from arsg_dist.safe_io.text import printable


@given(text=st.text())
def test_nothing_steers_the_terminal(text: str) -> None:
    """Catches a control, format or line-breaking character that reaches a terminal."""
    shown = printable(text)
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert len(shown.splitlines()) <= 1


def test_values() -> None:
    """Catches text that is changed without need, and what is hidden not being shown."""
    assert printable("v̂ Größe 重み a b") == "v̂ Größe 重み a b"
    assert printable("\x1b[31mred\x1b]0;title\x07") == r"\x1b[31mred\x1b]0;title\x07"
    assert printable("a\nb\r\u202etxt.exe\u2028") == r"a\nb\r\u202etxt.exe\u2028"
    assert printable("x" * 11, limit=10) == "x" * 10 + "…"
    assert printable(3) == "3"
