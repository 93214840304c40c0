"""Another torch than the pinned one, in an environment as a user has it."""

import os
import subprocess
import sys

import pytest

from tests.support.launchers import REPOSITORY

TORCH = "2.14.1"
"""That the table of docs/setup.md has a whole run of; another minor version than the pinned one's."""
TESTS = (
    "tests/optim/test_arsg_settings.py tests/optim/kernels tests/optim/schedulers "
    "tests/optim/test_state_round_trips.py tests/ddp tests/fsdp tests/checkpoint/test_format.py"
)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_wheel_beside_another_torch() -> None:
    """Catches an interface of torch that only the pinned version has, and metadata that replaces a user's torch."""
    row = f"{TORCH}/{sys.version_info.major}.{sys.version_info.minor}"
    done = subprocess.run(
        ["launch/test_versions.sh", row],
        cwd=REPOSITORY,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"TESTS": TESTS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    row = done.stdout.splitlines()[-1]  # what builds the wheel prints before
    assert row.startswith(f"| {TORCH} "), row
    assert " passed" in row
    assert "failed" not in row
