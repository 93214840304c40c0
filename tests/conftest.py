import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside several ranks on few cores


# Random tests see the same input in every run; `--hypothesis-profile hunt` gives them new input, and more of it.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("hunt", derandomize=False, database=None, deadline=None, max_examples=4000)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-detection", metavar="FILE", help="append what injected faults cost (JSON lines)"
    )
    parser.addoption(
        "--kills",
        type=int,
        default=12,
        help="kill points of the slow test, per engine; hundreds take half an hour",
    )
