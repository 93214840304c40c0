"""Warnings of libraries that a user can do nothing about."""

import sys
import warnings

import pytest

from arsg_dist.imagenet.cli import _future_warnings_once


@pytest.mark.parametrize(
    ("rank", "options", "shown"),
    [
        (0, [], ["first", "second", "other"]),
        (1, [], ["other"]),
        (1, ["default"], ["first"] * 3 + ["second", "other"]),
    ],
)
def test_future_warnings_are_shown_once_in_a_run(
    rank: int, options: list[str], shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one of torch's in every update of every rank, which hide what the run says; other warnings that are
    swallowed with them; and `python -W` that is not obeyed."""
    monkeypatch.setattr(sys, "warnoptions", options)
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        with _future_warnings_once(rank):
            for text in ("first", "first", "first", "second"):
                with warnings.catch_warnings():  # as torch does: Python forgets what it has shown
                    warnings.warn(text, FutureWarning, stacklevel=1)
            warnings.warn("other", UserWarning, stacklevel=1)
        assert [str(warning.message) for warning in log] == shown
