"""Ranks of the tests themselves: none outlives the session that wanted it."""

import os
import signal
import time
from pathlib import Path

import pytest

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
