import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.imagenet.conftest import digits, recipe, small_tree
from tests.support.warm_ranks import WarmRanks, warm_ranks

__all__ = ["digits", "recipe", "small_tree"]


@pytest.fixture(scope="session")
def warm() -> WarmRanks:
    """Ranks that start in a moment."""
    return warm_ranks()


@pytest.fixture
def detection(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes what a fault cost, in the file of --record-detection: see docs/reliability.md."""
    path = request.config.getoption("--record-detection")

    def note(fault: str, engine: str, **values: Any) -> None:
        if path:
            line = {"fault": fault, "engine": engine, "test": request.node.name, **values}
            with Path(path).open("a") as file:
                file.write(json.dumps(line) + "\n")

    return note
