import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.support.turns import TURNS

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
        default=8,
        help="kill points of the slow test, per engine; hundreds take half an hour",
    )
    parser.addoption(
        "--turn", type=int, help="which of the tests that take turns run (default: the commit decides)"
    )
    parser.addoption(
        "--full", action="store_true", help="tests that take turns run all; loads have every cell"
    )
    parser.addoption(
        "--sample",
        nargs=2,
        type=int,
        metavar=("CELLS", "SEED"),
        help="of the loads a random sample of all cells, in place of --full's every one",
    )


def _turn(config: pytest.Config) -> int:
    given: int | None = config.getoption("--turn")
    if given is None:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        given = int(commit.stdout, 16) if commit.returncode == 0 else 0
    return given % TURNS


def pytest_report_header(config: pytest.Config) -> str:
    if config.getoption("--full"):
        return "tests that take turns: all"
    return f"tests that take turns: those of --turn {_turn(config)} of 0 to {TURNS - 1}; --full has all"


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests whose turn it is not, but for those asked for by name."""
    now, kept, others = _turn(config), list[pytest.Item](), list[pytest.Item]()
    named = tuple(argument for argument in config.args if "::" in argument)
    for item in items:
        mark = item.get_closest_marker("turn")
        if mark:
            item.add_marker("slow")
        asked_for = item.nodeid in named or item.nodeid.startswith(tuple(f"{name}[" for name in named))
        due = (
            not mark
            or mark.args[0] == now % mark.kwargs.get("of", 3)
            or config.getoption("--full")
            or asked_for
        )
        (kept if due else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = kept


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep in one worker the tests of a file and of files that share checkpoints or hosts, to find things once."""
    from xdist.scheduler import LoadFileScheduling

    class FilesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/cluster/"):
                return "tests/cluster"
            file = nodeid.split("::", 1)[0]
            return (
                "tests/deepspeed/test_checkpoints.py" if file == "tests/deepspeed/test_universal.py" else file
            )

    return FilesTogether(config, log)
