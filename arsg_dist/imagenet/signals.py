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

    Python runs a handler when the main thread is back from what it does outside Python, such as a wait for other ranks:
    late, or never. So a thread hears of signals when they come.

    Attributes:
        received: name of the first signal this rank got, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._communicator: Communicator | None = None
        self._interrupted: float | None = None
        self._answer: Callable[[], bool] | None = None
        self._ending = threading.RLock()

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
            with self._listening():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        source, sink = os.pipe()
        os.set_blocking(sink, False)
        before = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
        _sinks.add(sink)
        listener = threading.Thread(target=self._listen, args=(source,), name="signals", daemon=True)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            _sinks.remove(sink)
            os.close(sink)
            listener.join()
            os.close(source)

    def _listen(self, source: int) -> None:
        while numbers := os.read(source, 64):
            now = time.monotonic()
            for number in numbers:
                self._hear(number, now)

    def begin(self, communicator: Communicator) -> None:
        """Take a signal from now on as one to stop after the step under way.

        Args:
            communicator: of all ranks.
        """
        self._communicator = communicator

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, in the main thread."""
        if number == signal.SIGHUP:
            leave_terminal()
        if self._communicator is None:
            self._end_untrained(number)
        self.received = self.received or signal.Signals(number).name

    def _hear(self, number: int, now: float) -> None:
        """End the process where a signal is to end it at once, whatever the main thread does."""
        if number not in SIGNALS:
            return  # somebody else's
        if self._communicator is None:
            self._end_untrained(number)
        elif number == signal.SIGINT:
            if self._interrupted is None:
                self._interrupted = now
                if self._communicator.rank == 0:
                    _say("Ctrl-C: saving after this update; once more ends at once, unsaved")
            elif now - self._interrupted > _ONE_KEYSTROKE:
                os._exit(128 + signal.SIGINT)

    def _end_untrained(self, number: int) -> None:
        with self._ending:  # of two threads, one
            name = signal.Signals(number).name
            _say(f"stopped by {name} before training began; start again (exit code {PREEMPTED})")
            os._exit(PREEMPTED)

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


_sinks: set[int] = set()  # where signals are told to threads that listen


def _tell_nothing() -> None:
    told = signal.set_wakeup_fd(-1)
    if told not in _sinks:
        signal.set_wakeup_fd(told)


# What a forked process is told is not meant for the one that listens.
os.register_at_fork(after_in_child=_tell_nothing)


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
