"""End a job: exit codes, the error that all ranks agree on, a rank's end."""

import logging
import os
import sys
from typing import Final, NoReturn

DONE: Final = 0
FAILED: Final = 1
BAD_INPUT: Final = 2
PREEMPTED: Final = 75
"""Told to stop, saved a checkpoint, to be started again with --resume (EX_TEMPFAIL of sysexits.h)."""


class JobError(RuntimeError):
    """Report what went wrong on at least one rank, raised on every rank alike."""


def end_process(code: int) -> NoReturn:
    """End this rank at once with an exit code; what it printed is flushed.

    For a rank that has closed its communicator, or that gives up while others wait for it. Python's ordinary end runs
    the destructors of native libraries, where a background thread of theirs was seen to abort a rank that had done all
    its work ("terminate called without an active exception"): the launcher then reports a failed job.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
