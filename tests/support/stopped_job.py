"""Program that "saves" for some seconds when it is told to stop: shows what launchers do, and starts at once.

usage: stopped_job.py DIRECTORY SECONDS
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

directory, seconds = Path(sys.argv[-2]), float(sys.argv[-1])
told: list[int] = []


def note(number: int, frame: FrameType | None) -> None:
    told.append(number)


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, note)
(directory / f"at-{os.getpid()}").touch()
give_up = time.monotonic() + 60
while not told and not (directory / "stop").exists():
    time.sleep(0.05)
    if time.monotonic() > give_up:
        os._exit(9)
(directory / "stop").touch()  # the ranks agree
end = time.monotonic() + seconds
while time.monotonic() < end:
    time.sleep(0.05)
(directory / f"saved-{os.getpid()}").touch()
os._exit(75)
