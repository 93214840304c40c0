"""A run with loader processes, told to stop as terminals, launchers and schedulers do: its whole process group."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arsg_dist.checkpoint import SavedRun
from arsg_dist.engine.job import PREEMPTED
from arsg_dist.imagenet.signals import MARKER
from tests.support.launchers import REPOSITORY


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name
)
def test_a_stop_of_the_process_group_saves_and_leaves_no_process(
    number: signal.Signals, recipe: list[str], tmp_path: Path
) -> None:
    """Catches loader processes that die of the signal before their rank has saved, as they did of Ctrl-C and SIGTERM:
    "DataLoader worker exited unexpectedly", no checkpoint, code 1."""
    run = tmp_path / "run"
    job = subprocess.Popen(
        [
            sys.executable,
            "tests/imagenet/jobs/imagenet_job.py",
            *recipe,
            "--epochs",
            "900",
            "--data.workers",
            "1",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "ARSG_TEST_SMALL_NETWORK": "1", "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.1)
        os.killpg(job.pid, number)
        output, _ = job.communicate(timeout=120)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == PREEMPTED, output[-5000:]
    assert "exited unexpectedly" not in output
    marker = json.loads((run / MARKER).read_text())
    assert marker["signals"] == [number.name]
    assert (
        SavedRun(Path(REPOSITORY / marker["checkpoint"])).progress["position"]["update"] == marker["update"]
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(job.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    left = subprocess.run(["ps", "-o", "pid,args", "-g", str(job.pid)], capture_output=True, text=True).stdout
    raise AssertionError(f"processes are left:\n{left}")
