"""Ranks that start in a moment: forked from a process that has imported everything, without a launcher.

What ends the others when one dies is then the training itself, not a launcher that kills them.

This file is also the program of that process: it reads requests (JSON lines), forks, and reports pids and ends.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINES = {
    "horovod": ["--engine", "horovod"],
    "horovod-sharded": ["--engine", "horovod-sharded"],
    "deepspeed": ["--deepspeed_config", "configs/deepspeed/zero1.json"],
    "deepspeed-0": ["--deepspeed_config", "configs/deepspeed/zero0.json"],
    "deepspeed-2": ["--deepspeed_config", "configs/deepspeed/zero2.json"],
    "deepspeed-3": ["--deepspeed_config", "configs/deepspeed/zero3.json"],
}


@dataclass
class EndedJob:
    """A job whose ranks have all ended.

    Attributes:
        codes: exit code of every rank, −9 for one that was killed.
        ended: `time.monotonic()` of every rank's end.
        outputs: what every rank printed.
        fault_at: `time.monotonic()` when the fault was injected, None if it was not.
    """

    codes: list[int]
    ended: list[float]
    outputs: list[str]
    fault_at: float | None

    @property
    def output(self) -> str:
        """What all ranks printed."""
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.outputs))

    def seconds_to_end(self) -> float:
        """From the fault to the end of the last rank."""
        assert self.fault_at is not None, f"the fault was not injected:\n{self.output[-6000:]}"
        return max(self.ended) - self.fault_at


@dataclass
class WarmRanks:
    """Starts `arsg-imagenet train` on ranks of this machine.

    Args:
        directory: for the ranks' output.
    """

    directory: Path
    _jobs: int = 0
    _reaped: dict[int, tuple[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._pending = b""
        self._wait_for("ready", 180)

    def close(self) -> None:
        """Ends the process; ranks still running are killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)

    def run(
        self,
        engine: str,
        *arguments: object,
        ranks: int = 2,
        faults: tuple[Mapping[str, Any], ...] = (),
        timeout: float = 60,
    ) -> EndedJob:
        """Runs a training to its end on all ranks.

        Args:
            engine: of `ENGINES`.
            arguments: of `arsg-imagenet train`, besides.
            ranks: how many.
            faults: see `fault_points.install`.
            timeout: seconds; after it the ranks are killed and the test fails, since that is a hang.
        """
        self._jobs += 1
        job = self.directory / f"job-{self._jobs}"
        job.mkdir(parents=True)
        variables, server = _wiring(engine, ranks)
        pids = []
        for rank in range(ranks):
            request = {
                "arguments": [*ENGINES[engine], *map(str, arguments)],
                "environment": {key: value.format(rank=rank) for key, value in variables.items()},
                "faults": [fault for fault in faults if fault["rank"] in (rank, "all")],
                "fault_file": str(job / "fault"),
                "output": str(job / f"rank-{rank}"),
            }
            self._send(request)
            pids.append(self._wait_for("pid", 30))
        end = time.monotonic() + timeout
        try:
            while any(pid not in self._reaped for pid in pids):
                left = end - time.monotonic()
                if left <= 0:
                    hung = [rank for rank, pid in enumerate(pids) if pid not in self._reaped]
                    for rank in hung:
                        os.kill(pids[rank], signal.SIGKILL)
                    self._wait_until(pids)
                    text = "\n".join((job / f"rank-{rank}").read_text()[-4000:] for rank in hung)
                    raise AssertionError(f"ranks {hung} were still running after {timeout} s:\n{text}")
                self._take(left)
        finally:
            if server is not None:
                server.stop()
        fault_file = job / "fault"
        return EndedJob(
            codes=[self._reaped[pid][0] for pid in pids],
            ended=[self._reaped[pid][1] for pid in pids],
            outputs=[(job / f"rank-{rank}").read_text() for rank in range(ranks)],
            fault_at=float(fault_file.read_text()) if fault_file.exists() else None,
        )

    def _wait_until(self, pids: list[int]) -> None:
        while any(pid not in self._reaped for pid in pids):
            self._take(20)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def _take(self, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        if b"\n" not in self._pending:
            if not select.select([self._process.stdout], [], [], seconds)[0]:
                return None
            read = os.read(self._process.stdout.fileno(), 65536)
            assert read, "the process that forks ranks has ended"
            self._pending += read
            if b"\n" not in self._pending:
                return None
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "ended" in answer:
            self._reaped[answer["ended"]] = (answer["code"], answer["at"])
        return answer

    def _wait_for(self, key: str, seconds: float) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = self._take(end - time.monotonic())
            if answer and key in answer:
                return int(answer[key])
        raise AssertionError(f"no {key} from the process that forks ranks")


def _wiring(engine: str, ranks: int) -> tuple[dict[str, str], Any]:
    """The variables a launcher would set, {rank} standing for the rank, and a server to be stopped at the end."""
    if engine.startswith("deepspeed"):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        return {
            "RANK": "{rank}",
            "LOCAL_RANK": "{rank}",
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }, None
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer(0)
    port = server.start()
    server.init(get_host_assignments(parse_hosts(f"localhost:{ranks}"), ranks))
    return {
        "HOROVOD_RANK": "{rank}",
        "HOROVOD_SIZE": str(ranks),
        "HOROVOD_LOCAL_RANK": "{rank}",
        "HOROVOD_LOCAL_SIZE": str(ranks),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_IFACE": "lo",
        "PYTHONUNBUFFERED": "1",
    }, server


def _serve() -> None:
    """The program of the process that forks ranks."""
    import gc

    global _answers
    _answers = os.dup(1)
    os.dup2(2, 1)  # imports print
    import deepspeed  # noqa: F401
    import horovod.torch  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import arsg_dist.deepspeed
    import arsg_dist.horovod
    import arsg_dist.imagenet.cli  # noqa: F401
    from tests.support import fault_points  # noqa: F401

    gc.freeze()
    running: set[int] = set()
    _say({"ready": True})
    pending = b""
    while True:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.discard(pid)
                _say({"ended": pid, "code": os.waitstatus_to_exitcode(status), "at": time.monotonic()})
        if not select.select([0], [], [], 0.02)[0]:
            continue
        read = os.read(0, 65536)
        if not read:
            break
        pending += read
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            pid = os.fork()
            if not pid:
                _be_a_rank(json.loads(line))
            running.add(pid)
            _say({"pid": pid})
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


_answers = 1


def _say(answer: dict[str, Any]) -> None:
    os.write(_answers, (json.dumps(answer) + "\n").encode())


def _be_a_rank(request: dict[str, Any]) -> None:
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["environment"])
    from arsg_dist.engine import end_process
    from arsg_dist.imagenet.cli import train_command
    from tests.support import fault_points

    code = 1
    try:
        fault_points.install(request["faults"], Path(request["fault_file"]))
        code = train_command(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    end_process(code)


if __name__ == "__main__":
    _serve()
