"""What a rank does with a signal, in this process; `tests/faults` stops real runs."""

import ctypes
import os
import pty
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from arsg_dist.engine import SingleProcessCommunicator
from arsg_dist.engine.job import PREEMPTED
from arsg_dist.imagenet import cli, signals
from arsg_dist.imagenet.signals import SIGNALS, StopRequest
from arsg_dist.imagenet.training.optimization import Schedules


@pytest.fixture
def outside() -> Iterator[list[int]]:
    """The signals that came to the handlers of before, which would have ended the process."""
    got: list[int] = []
    before = {number: signal.signal(number, lambda number, _: got.append(number)) for number in SIGNALS}
    yield got
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_training_ends_the_rank_with_the_code_for_another_start(
    number: signal.Signals, outside: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a rank that dies of it with a code that has no batch script start it again, and one that goes on waiting
    for the others to connect."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(signals, "leave_terminal", lambda: None)
    with StopRequest().installed():
        os.kill(os.getpid(), number)
        assert codes
    assert set(codes) == {PREEMPTED}
    assert not outside


@pytest.mark.parametrize(
    ("training", "sent", "code"),
    [(False, [signal.SIGTERM], PREEMPTED), (True, [signal.SIGINT, signal.SIGINT], 128 + signal.SIGINT)],
    ids=["before training", "Ctrl-C twice"],
)
def test_a_rank_that_never_comes_back_from_a_wait_outside_python_is_ended(
    training: bool, sent: list[signal.Signals], code: int
) -> None:
    """Catches a rank that waits in a library for others that do not come, and is deaf until a kill -9."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(sink, 2)
        signals._ONE_KEYSTROKE = -1  # another is another
        stop = StopRequest()
        if training:
            stop.begin(SingleProcessCommunicator())
        with stop.installed():
            mutex = ctypes.create_string_buffer(64)  # of zeros: one that is free
            os.write(2, b"waits ")
            for _ in range(2):
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
        os._exit(3)
    os.close(sink)
    said = os.read(source, 99)
    while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] not in "SZ":
        os.sched_yield()
    for number in sent:
        os.kill(child, number)
        if not select.select([source], [], [], 20)[0]:
            os.kill(child, signal.SIGKILL)
        said += os.read(source, 99)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(source)
    assert ended == code, said


def test_a_ctrl_c_that_a_launcher_passes_on_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that ends unsaved since a terminal and a launcher have sent it the same Ctrl-C, and one that a
    second Ctrl-C does not end."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop = StopRequest()
    stop.begin(SingleProcessCommunicator())
    for seconds in (0.0, 0.01, 0.9):
        stop._hear(signal.SIGINT, 100 + seconds)
        stop._hear(signal.SIGTERM, 109)  # schedulers send it again
    assert not codes
    stop._hear(signal.SIGINT, 101.1)
    assert codes == [128 + signal.SIGINT]


def test_what_a_forked_process_gets_is_its_own(outside: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that ends since a process was terminated that a library has forked from it."""
    codes, end = list[int](), os._exit
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopRequest().installed():
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, lambda *_: end(7))
            os.kill(os.getpid(), signal.SIGTERM)
            end(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not codes
    assert not outside


def test_a_signal_that_comes_again_when_the_run_has_saved_changes_no_exit_code(
    outside: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Catches handlers that are gone when the training has returned, while ranks still take leave of each other: a
    launcher that signals twice would make 143 of 75. And a Ctrl-C that is answered with silence."""
    real = Schedules.after_update

    def after_update(self: Schedules) -> None:
        real(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Schedules, "after_update", after_update)
    monkeypatch.setattr(SingleProcessCommunicator, "close", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    recipe = ["--data.source", "synthetic", "--data.synthetic_images", "12", "--data.image_size", "16"]
    recipe += ["--model", "resnet20", "--batch_size", "2", "--val_batch_size", "4", "--data.workers", "0"]
    assert cli.train_command([*recipe, "--epochs", "9", "--output", str(tmp_path / "run")]) == PREEMPTED
    assert not outside
    assert capfd.readouterr().err.count("Ctrl-C: saving after this update") == 1


def test_a_terminal_that_is_gone_does_not_fail_the_run(outside: list[int]) -> None:
    """Catches a run whose next line to a terminal that is closed ends it with an error, before it has saved."""
    master, terminal = pty.openpty()
    child = os.fork()
    if not child:
        try:
            os.dup2(terminal, 1)
            os.close(master)
            stop = StopRequest()
            stop.begin(SingleProcessCommunicator())
            with stop.installed():
                os.read(terminal, 1)  # until the other end is closed
                os.kill(os.getpid(), signal.SIGHUP)
                os.write(1, b"goes on")
            os._exit(0 if stop.received == "SIGHUP" else 3)
        except OSError:
            os._exit(4)
    os.close(terminal)
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_under_nohup_a_run_outlives_its_terminal() -> None:
    """Catches `nohup arsg-imagenet train`, made to go on, that stops when its terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        stop.begin(SingleProcessCommunicator())
        with stop.installed():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
