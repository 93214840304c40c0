"""What a training program's exit code tells the script or person that started it."""

from typing import Final

DONE: Final = 0
FAILED: Final = 1
BAD_INPUT: Final = 2
PREEMPTED: Final = 75
"""Told to stop, saved a checkpoint, to be started again with --resume (EX_TEMPFAIL of sysexits.h)."""
