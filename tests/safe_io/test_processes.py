"""What started processes may import."""

import os

import pytest

from arsg_dist.safe_io.processes import safe_start


@pytest.mark.parametrize("before", [None, "", "1"])
def test_children_do_not_import_from_the_current_directory(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a started Python that imports a module lying in the current directory, and a user's setting lost."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONSAFEPATH", before)
    with safe_start():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ.get("PYTHONSAFEPATH") == before
