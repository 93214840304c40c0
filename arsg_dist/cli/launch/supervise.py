"""Run a launcher; fail if stderr reports a lost host, even on exit code 0.

python -P -m arsg_dist.cli.launch.supervise mpirun ...
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

# Open MPI 5.0.11 exits with 0 when it has lost a host; seen on rehearsal hosts whose network was cut.
LOST_HOST = "lost communication with a remote daemon"


def run_watched(
    command: Sequence[str],
    failure_text: str,
    *,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run a command and pass TERM, HUP, USR1 and USR2 on to it.

    Args:
        command: executed without a shell.
        failure_text: printed by the command on stderr, it means failure whatever the exit code says; "" for none.
        directory: to run it in; default this one.
        environment: variables added to this process's.

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

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)
        if not started:
            early.append(number)

    # Before the command starts: a signal in between would end this process and leave the command running.
    before: dict[int, Any] = {
        number: signal.signal(number, pass_on)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    }
    try:
        process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **(environment or {})}, stderr=watched
        )
        started.append(process)
        for number in early:
            process.send_signal(number)
        # A terminal sends ^C to both. Not before the start: the command would ignore it, too.
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
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


if __name__ == "__main__":
    sys.exit(run_watched(sys.argv[1:], LOST_HOST))
