"""Stop a run on a signal: all ranks agree, save, and end with a code of its own."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from arsg_dist.engine import Communicator
from arsg_dist.engine.job import PREEMPTED
from arsg_dist.safe_io.files import write_text
from arsg_dist.safe_io.processes import leave_terminal

MARKER = "requeue.json"
"""File in the run's directory that says the same where a launcher rewrites exit codes; removed by the next start."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What schedulers send before they kill, a terminal sends for Ctrl-C, and the system when a terminal is gone."""

_ONE_KEYSTROKE = 1.0  # seconds in which a Ctrl-C also comes again from a launcher that passes it on


class StopRequest:
    """The signals that this rank gets, and what the other ranks got.

    Before training, while a rank connects, there is nothing to save: a signal ends it at once, with the code that
    has the job started again. A second Ctrl-C, a second or more after the first, ends the process at once.

    Attributes:
        received: name of the first signal this rank got, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._communicator: Communicator | None = None
        self._interrupted: float | None = None
        self._answer: Callable[[], bool] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside; a thread other than the main one cannot.

        A program stays inside until it ends: launchers send a signal again, and one that came after the run has saved
        would end the rank with another code than the one that has it started again.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self._note)
            for number in SIGNALS
            # Under nohup a run outlives its terminal. A shell has what it starts with & ignore Ctrl-C, though a signal
            # that is sent to it is meant.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def begin(self, communicator: Communicator) -> None:
        """Take a signal from now on as one to stop after the step under way.

        Args:
            communicator: of all ranks.
        """
        self._communicator = communicator

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            leave_terminal()
        if self._communicator is None:
            _say(f"stopped by {name} before training began; start again (exit code {PREEMPTED})")
            os._exit(PREEMPTED)
        first, self.received = self.received is None, self.received or name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is not None and now - self._interrupted > _ONE_KEYSTROKE:
            os._exit(128 + signal.SIGINT)
        self._interrupted = self._interrupted or now
        if first and self._communicator.rank == 0:
            _say("Ctrl-C: saving after this update; once more ends at once, unsaved")

    def agreed(self) -> bool:
        """Tell whether to stop now, once per step, alike on all ranks. Collective.

        The ranks exchange one integer in main memory while they compute the next step and read the answer after it:
        a signal stops the run after the step it came in or the one after that.
        """
        assert self._communicator is not None, "asked before begin()"
        stop = self._answer is not None and self._answer()
        self._answer = self._communicator.start_any(self.received is not None)
        return stop

    def finish(self) -> None:
        """Wait for what `agreed` left under way, before a job's end. Collective."""
        if self._answer is not None:
            self._answer()
            self._answer = None


def _say(text: str) -> None:
    """Write a line to stderr from a signal handler, which must not use a buffer that it may have interrupted."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


@contextmanager
def signals_held() -> Iterator[None]:
    """Keep the signals of a stop from processes started inside; delay them here.

    Terminals, launchers and schedulers signal whole process groups: without this, loader workers would die of a signal
    that asks the run to finish its step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_marker(output: Path, *, checkpoint: Path, update: int, signals: list[str]) -> None:
    """Say in the run's directory that it is to be started again with --resume.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(
        {"exit_code": PREEMPTED, "signals": signals, "update": update, "checkpoint": str(checkpoint)}
    )
    write_text(output / MARKER, text + "\n")
