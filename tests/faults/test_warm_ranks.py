"""Ranks and jobs of the tests themselves: none outlives the session that wanted it."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support.launchers import launch
from tests.support.warm_ranks import WarmRanks, _end_with

PROGRAM = """
import ctypes, os, sys
signal = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(signal))
print("killed with its parent by", signal.value)
"""


@pytest.mark.ranks
def test_a_rank_is_killed_when_the_process_that_forked_it_has_gone(warm: WarmRanks, tmp_path: Path) -> None:
    """Catches ranks that wait for each other for ever, with a core each, after an interrupted session."""
    (tmp_path / "program.py").write_text(PROGRAM)
    job = warm.run_program("alone", tmp_path / "program.py", environment=dict(os.environ), ranks=1)
    assert f"killed with its parent by {signal.SIGKILL:d}\n" in job.output


@pytest.mark.parametrize("when", ["later", "before"])
def test_a_process_ends_with_its_parent(when: str) -> None:
    """Catches one that goes on when its parent was killed, or when it was gone before it could be watched."""
    ends, alive = os.pipe()
    parent = os.fork()
    if not parent:
        here = os.getpid()
        if not os.fork():
            while when == "before" and os.getppid() == here:
                time.sleep(0.001)
            _end_with(here)
            os.write(alive, b"watched")
            time.sleep(60)
            os.write(alive, b"alive")
            os._exit(0)
        if when == "later":
            time.sleep(60)
        os._exit(0)
    os.close(alive)
    if when == "later":
        assert os.read(ends, 7) == b"watched"
        os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(ends, 5) == b""  # nobody has the other end any more
    os.close(ends)


def test_an_interrupted_session_leaves_no_job(tmp_path: Path) -> None:
    """Catches a launcher, and ranks below it, that go on when the session that waits for them is interrupted."""
    program, started = tmp_path / "program.py", tmp_path / "started"
    os.mkfifo(started)
    program.write_text(
        "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    pids = []

    def interrupt() -> None:
        pids.append(int(started.read_text()))
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            launch("alone", 1, program, started)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
