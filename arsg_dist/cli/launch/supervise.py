"""Run a launcher; fail if stderr reports a lost host, even on exit code 0.

python -P -m arsg_dist.cli.launch.supervise mpirun ...
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

# Open MPI 5.0.11 exits with 0 when it has lost a host; seen on rehearsal hosts whose network was cut.
LOST_HOST = "lost communication with a remote daemon"
_RANK = (b"RANK", b"OMPI_COMM_WORLD_RANK", b"HOROVOD_RANK", b"PMIX_RANK")


def run_watched(
    command: Sequence[str],
    failure_text: str,
    *,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    own_group: bool = False,
) -> int:
    """Run a launcher, and have its ranks get the signals TERM, INT, HUP, USR1 and USR2 of this process.

    Most launchers die of one of them or leave the ranks no time to save (docs/reliability.md). So the first signal goes
    past the launcher to the ranks on this host, of which one is enough: they agree, save, and end, and with them the
    launcher. Where no rank is here, and from the second signal on, the launcher gets it.

    Args:
        command: executed without a shell.
        failure_text: printed by the command on stderr, it means failure whatever the exit code says; "" for none.
        directory: to run it in; default this one.
        environment: variables added to this process's.
        own_group: a terminal's Ctrl-C comes to this process alone, which hands it on as the other signals; the command
            reads no terminal.

    Returns:
        The exit code, 128 + the number of the signal that ended it, or 1 for a 0 that is contradicted by
        `failure_text`.

    Raises:
        FileNotFoundError: no such command.
    """
    sought, tail, failed = failure_text.encode(), b"", False
    watched = subprocess.PIPE if sought else None
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []
    signalled: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and started and not own_group and _is_in_foreground():
            return  # the command has it from the terminal
        if not started:
            early.append(number)
            return
        (process,), first = started, not signalled
        signalled.append(number)  # at once: another may come in between
        ranks = _ranks_below(process.pid) if first else []
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, number)
        if not ranks:
            spared = number == signal.SIGTERM and first and Path(command[0]).name == "mpirun"
            # Told to terminate, Open MPI's kills its ranks a third of a second later. This it hands on to them.
            process.send_signal(signal.SIGUSR1 if spared else number)

    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    # Ignored by what a script starts with &, and then by the command too.
    if own_group or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        numbers.append(signal.SIGHUP)
    # Before the command starts: a signal in between would end this process and leave the command running.
    before: dict[int, Any] = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={**os.environ, **(environment or {})},
            stderr=watched,
            process_group=0 if own_group else None,
            # A process in the background that reads a terminal is stopped.
            stdin=subprocess.DEVNULL if own_group and os.isatty(0) else None,
        )
        started.append(process)
        for number in early:
            process.send_signal(number)
        with process:
            while process.stderr is not None and (chunk := os.read(process.stderr.fileno(), 65536)):
                os.write(sys.stderr.fileno(), chunk)
                failed = failed or sought in tail + chunk
                tail = (tail + chunk)[-len(sought) :]
            process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed and process.returncode == 0:
        print(f"error: {command[0]} exited with 0, but {failure_text}", file=sys.stderr)  # noqa: T201
        return 1
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def _is_in_foreground() -> bool:
    """Tell whether a terminal sends its Ctrl-C to this process and all of its group."""
    _, _, group, _, _, foreground = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[:6]
    return group == foreground


def _ranks_below(launcher: int) -> list[int]:
    """Find the ranks on this host: in each branch of a launcher's processes the first that has a rank's variable."""
    children: dict[int, list[int]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            parent = (directory / "stat").read_bytes().rpartition(b")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(directory.name))
    ranks: list[int] = []
    looked_at = [launcher]
    while looked_at:
        for process in children.get(looked_at.pop(), []):
            (ranks if _is_rank(process) else looked_at).append(process)
    return ranks


def _is_rank(process: int) -> bool:
    with suppress(OSError):
        names = {
            entry.partition(b"=")[0] for entry in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        }
        return any(name in names and name.decode() not in os.environ for name in _RANK)
    return False


if __name__ == "__main__":
    sys.exit(run_watched(sys.argv[1:], LOST_HOST))
