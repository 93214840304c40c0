import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside several ranks on few cores


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
