"""Run a command on every host over ssh, until as many as are needed have ended well.

    python -P .../over_ssh.py JOB.json

Executed by its path, with the standard library alone. The job's file has the commands and the names of variables; their
values are this process's own and go through ssh's input, so they stand in no file and no command line. A host whose ssh
ends, because this process was killed or the network is gone, ends its command.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

_GRACE_SECONDS = 45  # torchrun gives its ranks 30


def script(directory: str, command: list[str], variables: Mapping[str, str]) -> str:
    """Return what a host's shell reads: the command, which ends when the shell's input does."""
    return "\n".join(
        [
            f"cd {shlex.quote(directory)} || exit 2",
            *(f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())),
            "exec 3<&0",
            f"{shlex.join(command)} 3<&- </dev/null & started=$!",
            '{ while read -r line; do :; done; kill -TERM "$started"; } <&3 >/dev/null 2>&1 & watch=$!',
            'wait "$started"; code=$?',
            'kill "$watch" 2>/dev/null; exit "$code"',
            "",
        ]
    )


def main(path: str) -> int:
    """Run the job; return 0, or the code of the first host that failed."""
    job: dict[str, Any] = json.loads(Path(path).read_text())  # noqa: TID251 - which the launch has just written
    variables = {name: os.environ[name] for name in job["variables"] if name in os.environ}
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, stop)
    started: dict[str, subprocess.Popen[bytes]] = {}
    for host, command in job["hosts"].items():
        # Of a group of its own: Ctrl-C is to reach the ranks through the command, which gives them time.
        process = subprocess.Popen(["ssh", *job["ssh"], host, "sh"], stdin=subprocess.PIPE, process_group=0)
        started[host] = process
        text = script(job["directory"], command, variables).encode()
        threading.Thread(target=_send, args=(process, text), daemon=True).start()
    codes: dict[str, int] = {}
    end = 0.0
    while len(codes) < len(started):
        for host, process in started.items():
            if host not in codes and process.poll() is not None:
                codes[host] = process.returncode
                if process.returncode:
                    print(f"{host}: ended with {process.returncode}", file=sys.stderr)  # noqa: T201
        lost = sum(code != 0 for code in codes.values())
        if not end and (stopped or len(started) - lost < job["least"]):
            end = time.monotonic() + _GRACE_SECONDS
            for process in started.values():
                if process.stdin is not None:
                    with suppress(OSError):
                        process.stdin.close()
        if end and time.monotonic() > end:
            for process in started.values():
                process.kill()
        time.sleep(0.1)
    if sum(code == 0 for code in codes.values()) >= job["least"]:
        return 0
    failed = next(code for code in codes.values() if code)
    return 128 + stopped[0] if stopped else failed if failed > 0 else 128 - failed


def _send(process: subprocess.Popen[bytes], text: bytes) -> None:
    assert process.stdin is not None
    with suppress(OSError):  # ssh has ended, which its code says
        process.stdin.write(text)
        process.stdin.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
