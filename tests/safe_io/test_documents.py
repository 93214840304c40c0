"""YAML and JSON that somebody prepared, and every document that Python's own writers make."""

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arsg_dist.safe_io.documents import MAX_DEPTH, dump_yaml, parse_json, parse_yaml

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


@given(document=DOCUMENTS)
def test_what_was_written_is_read(document: Any) -> None:
    """Catches a check that refuses, or changes, an ordinary document."""
    assert parse_json(json.dumps(document), "x") == document
    assert parse_yaml(dump_yaml(document), "x") == document


@pytest.mark.parametrize(
    "text", ["0E0", "1e-3", "1e5", "0x1F", "1_000", ".5", "1:30", "on", "~", "<<", "=", ""]
)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    """Catches a run named 1e5 whose records say 100000.0."""
    document = {text or "empty": [text]}
    assert parse_yaml(dump_yaml(document), "x") == document


def test_numbers_that_json_does_not_have() -> None:
    """Catches records of a run that diverged being called damaged."""
    assert parse_json("[Infinity, -Infinity]", "x") == [math.inf, -math.inf]
    assert math.isnan(parse_json("NaN", "x"))


@given(text=st.text() | st.text(alphabet="[]{}:,-&*!<>|'\"#% \n\t0a"))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Catches an error that is no ValueError, which the command line would show as a traceback."""
    for parse in (parse_json, parse_yaml):
        with suppress(ValueError):
            parse(text, "x")


# 9⁶ values: more than are read, and few enough for the test to end where they are read all the same.
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 6)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 6)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LAUGHS, "its aliases counted"),
        (MERGES, "its aliases counted"),
        ("&a [*a]", "nested deeper than 64 levels"),
        ("[" * 5000, "nested deeper than 64 levels"),
        ("[" * 65 + "]" * 65, "nested deeper than 64 levels"),
        ("a: 1\nb: {c: 1, c: 2}", "the key 'c' is there twice, line 2"),
        ("!!python/object/apply:os.system ['true']", "line 1 is no plain value"),
        ("!!python/name:os.system", "line 1 is no plain value"),
        ("x: !include /etc/passwd", "line 1 is no plain value"),
        ("!!timestamp 2020-13-45", "line 1 is no plain value"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_yaml_that_is_refused(text: str, why: str) -> None:
    """Catches a document of a kilobyte that takes a minute, and one that names Python objects."""
    with pytest.raises(ValueError, match=r"^recipe\.yaml ") as caught:
        parse_yaml(text, "recipe.yaml")
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 5000, "nested deeper"),
        ("[" * 100_000 + "]" * 100_000, "nested deeper"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("9" * 5000, "not valid JSON"),
        ("", "not valid JSON"),
    ],
    ids=["open", "deep", "objects", "duplicate", "digits", "empty"],
)
def test_json_that_is_refused(text: str, why: str) -> None:
    """Catches brackets that end in a RecursionError, and a key whose second value is taken."""
    with pytest.raises(ValueError, match=r"^config\.json ") as caught:
        parse_json(text, "config.json")
    assert why in str(caught.value)


def test_numbers_are_those_of_yaml_1_2() -> None:
    """Catches 1e-3 read as text, and dates and 1:30 read as anything but text."""
    read = parse_yaml("[1e-3, -2.5, .5, 1_000, 0x1f, 1:30, 2026-01-31, 2020-13-45, yes, true, ~, .inf]", "x")
    assert read == [1e-3, -2.5, 0.5, 1000, 31, "1:30", "2026-01-31", "2020-13-45", True, True, None, math.inf]


def test_the_deepest_document_that_is_read() -> None:
    """Catches a bound that is off by one, or lower than it says."""
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_yaml(deepest, "x") == parse_json(deepest, "x")
    repeated = parse_yaml("a: &a [1, 2]\nb: *a\n<<: {c: 3}", "x")
    assert repeated == {"a": [1, 2], "b": [1, 2], "c": 3}
