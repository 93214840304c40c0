"""Ranks that start in a moment: forked from processes that have imported everything, without a launcher.

A start of Python with torch, DeepSpeed and Horovod takes longer than most trainings of the tests, and the launchers are
such starts too. Those have tests of their own; what is asked of the ranks alone is asked of forked ones.

There are two processes to fork from, for ranks of even and of odd numbers, each with a hash seed of its own: so ranks
that go through a set differ in its order here as they do under a launcher.

This file is also the program of such a process: it reads requests (JSON lines), forks, and reports pids and ends.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.engines import ENGINES, STAGES

REPOSITORY = Path(__file__).resolve().parents[2]
FORKS = 2
GRACE = 60  # seconds in which ranks are to end by themselves once another has failed


def python_path() -> str:
    """The checkout, behind what this process was given: another DeepSpeed, say (tests/deepspeed/versions.py)."""
    return os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(REPOSITORY)])


@dataclass
class EndedJob:
    """A job whose ranks have all ended.

    Attributes:
        codes: exit code of every rank, −9 for one that was killed.
        ended: `time.monotonic()` of every rank's end.
        outputs: what every rank printed.
        fault_at: `time.monotonic()` when the fault was injected, None if it was not.
        groups: process group of every rank.
    """

    codes: list[int]
    ended: list[float]
    outputs: list[str]
    fault_at: float | None
    groups: list[int] = field(default_factory=list)

    @property
    def output(self) -> str:
        """What all ranks printed."""
        return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(self.outputs))

    @property
    def code(self) -> int:
        """The exit code of the rank that failed first, 0 if none did."""
        failed = [(at, code) for at, code in zip(self.ended, self.codes, strict=True) if code]
        return min(failed)[1] if failed else 0

    def seconds_to_end(self) -> float:
        """From the fault to the end of the last rank."""
        assert self.fault_at is not None, f"the fault was not injected:\n{self.output[-6000:]}"
        return max(self.ended) - self.fault_at


@functools.cache
def warm_ranks() -> "WarmRanks":
    """The ones of this test session."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    ranks = WarmRanks(directory)
    atexit.register(ranks.close)
    return ranks


@dataclass
class WarmRanks:
    """Runs programs on ranks of this machine.

    Args:
        directory: for the ranks' output.
    """

    directory: Path
    _jobs: int = 0
    _forks: list["_Fork"] = field(default_factory=list)

    def close(self) -> None:
        """Ends the processes; ranks still running are killed."""
        for fork in self._forks:
            fork.close()

    def run(
        self,
        engine: str,
        *arguments: object,
        ranks: int = 2,
        faults: tuple[Mapping[str, Any], ...] = (),
        timeout: float = 240,
    ) -> EndedJob:
        """Runs a training to its end on all ranks; nothing but the training itself ends ranks when one dies.

        Args:
            engine: of `ENGINES` or `STAGES`.
            arguments: of `arsg-imagenet train`, besides.
            ranks: how many.
            faults: see `fault_points.install`.
            timeout: seconds, besides those in which they had no core; after it the ranks are killed and the test fails,
                since that is a hang.
        """
        started = (ENGINES | STAGES)[engine]
        return self.run_program(
            started.launcher,
            "launch/train_imagenet.py",
            *started.options,
            *arguments,
            environment=dict(os.environ),
            ranks=ranks,
            faults=faults,
            timeout=timeout,
        )

    def run_program(
        self,
        launcher: str,
        program: str | Path,
        *arguments: object,
        environment: Mapping[str, str],
        ranks: int,
        faults: tuple[Mapping[str, Any], ...] = (),
        timeout: float = 240,
        port: int = 0,
        largest_file: int | None = None,
        end_together: bool = False,
    ) -> EndedJob:
        """Runs a program to its end on all ranks.

        Args:
            launcher: whose variables the ranks find: "deepspeed", "torchrun", "horovodrun" (over Gloo) or "alone".
            program: relative to the repository, or absolute.
            arguments: of the program; {rank} stands for the rank.
            environment: all variables, besides those of the launcher.
            ranks: how many.
            faults: see `fault_points.install`.
            timeout: seconds, besides those in which they had no core; after it the ranks are killed and the test fails,
                since that is a hang.
            port: at which torch's ranks meet; 0: any that is free.
            largest_file: bytes; writing more to a file fails, as on a full disk.
            end_together: when a rank has failed and others have not ended soon after, the test fails then: it need not
                wait for `timeout` to show what the rank said.
        """
        self._jobs += 1
        job = self.directory / f"job-{self._jobs}"
        job.mkdir(parents=True)
        while len(self._forks) < min(ranks, FORKS):
            self._forks.append(_Fork(seed=len(self._forks)))
        for fork in self._forks:  # all, before a rank begins to wait for the others
            fork.get_ready()
        variables, server = _wiring(launcher, ranks, port)
        running = []
        for rank in range(ranks):
            fork = self._forks[rank % FORKS]
            request = {
                "program": str(REPOSITORY / program),
                "arguments": [str(argument).replace("{rank}", str(rank)) for argument in arguments],
                "environment": {
                    **environment,
                    **{key: value.format(rank=rank) for key, value in variables.items()},
                },
                "faults": [fault for fault in faults if fault["rank"] in (rank, "all")],
                "fault_file": str(job / "fault"),
                "output": str(job / f"rank-{rank}"),
                "largest_file": largest_file,
            }
            running.append((fork, fork.start(request)))
        try:
            _wait(running, timeout, job, end_together=end_together)
        finally:
            if server is not None:
                server.stop()
        fault_file = job / "fault"
        ends = [fork.ended[pid] for fork, pid in running]
        return EndedJob(
            codes=[code for code, _ in ends],
            ended=[at for _, at in ends],
            outputs=[(job / f"rank-{rank}").read_text() for rank in range(ranks)],
            fault_at=float(fault_file.read_text()) if fault_file.exists() else None,
            groups=[pid for _, pid in running],
        )


class _Fork:
    """A process that ranks are forked from, seen from the test."""

    def __init__(self, seed: int) -> None:
        self.ended: dict[int, tuple[int, float]] = {}
        self._process: Any = _prepared.pop() if _prepared else self._started(seed)
        self._pending = b""
        self._ready = False

    @staticmethod
    def _started(seed: int) -> Any:
        return subprocess.Popen(
            [sys.executable, "-u", __file__],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": python_path(),
                "OMP_NUM_THREADS": "1",
                "PYTHONHASHSEED": str(seed),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(20)

    def get_ready(self) -> None:
        """Waits until everything is imported."""
        if not self._ready:
            self._process.stdin.write(b"\n")
            self._wait_for("ready", 590)
            self._ready = True

    def start(self, request: dict[str, Any]) -> int:
        """Forks a rank; its pid."""
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        pid = self._wait_for("pid", 300)
        self.ended.pop(pid, None)  # of an earlier rank: the system gives numbers again
        return pid

    def take(self, seconds: float) -> dict[str, Any] | None:
        """The next answer, if there is one within this time."""
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
            self.ended[answer["ended"]] = (answer["code"], answer["at"])
        return answer

    def _wait_for(self, key: str, seconds: float) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            answer = self.take(end - time.monotonic())
            if answer and key in answer:
                return int(answer[key])
        raise AssertionError(f"no {key} from the process that forks ranks")


_prepared: list[Any] = []


def prepare() -> None:
    """Forks the processes from this one, which has imported the libraries, and is at the beginning of its work.

    They import the rest, and have its hash seed: for tests.mutation, which starts them hundreds of times.
    """
    while len(_prepared) < FORKS:
        (requests, ours), (theirs, answers) = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(requests, 0)
            os.dup2(answers, 1)
            os.closerange(3, 4096)  # the other's pipes among them
            for stream in (sys.stdout, sys.stderr):
                stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
            sys.path.insert(0, "")  # of the program
            if os.read(0, 1):  # somebody wants ranks; else all is over
                _serve()
            os._exit(0)
        os.close(requests)
        os.close(answers)
        process = types.SimpleNamespace(
            stdin=os.fdopen(ours, "wb", 0),
            stdout=os.fdopen(theirs, "rb", 0),
            wait=lambda _, pid=pid: os.waitpid(pid, 0),
        )
        _prepared.append(process)


def without_core(pids: Iterable[int]) -> float:
    """Seconds that a thread of these processes, or of those below them, was ready to run and had no core.

    Of the thread that waited longest. A limit that is given so much more does not count a busy machine as a hang.
    """
    return max(each_without_core(pids).values(), default=0.0)


def each_without_core(pids: Iterable[int]) -> dict[int, float]:
    """The same of each of these processes and of those below them."""
    longest, left = dict[int, float](), list(pids)
    while left:
        pid = left.pop()
        with contextlib.suppress(OSError):  # processes and threads end meanwhile
            for thread in Path(f"/proc/{pid}/task").iterdir():
                waited = int((thread / "schedstat").read_text().split()[1]) / 1e9
                longest[pid] = max(longest.get(pid, 0.0), waited)
                left += map(int, (thread / "children").read_text().split())
    return longest


def _wait(running: list[tuple[_Fork, int]], timeout: float, job: Path, *, end_together: bool) -> None:
    """Until every rank has ended; AssertionError if they do not."""
    end = time.monotonic() + timeout
    hang = f"after {timeout} s"
    while left := [rank for rank, (fork, pid) in enumerate(running) if pid not in fork.ended]:
        over = time.monotonic() - end
        if over > 0 and over > without_core(running[rank][1] for rank in left):
            for number in (signal.SIGABRT, signal.SIGKILL):  # the first has them print where they are
                for rank in left:
                    if running[rank][1] not in running[rank][0].ended:
                        os.kill(running[rank][1], number)
                for rank in left:
                    running[rank][0].take(2)
            for rank in left:
                fork, pid = running[rank]
                while pid not in fork.ended:
                    fork.take(1)
            text = "\n".join(
                f"--- rank-{rank}, ended with {fork.ended[pid][0]}\n{(job / f'rank-{rank}').read_text()[-4000:]}"
                for rank, (fork, pid) in enumerate(running)
            )
            raise AssertionError(f"ranks {left} were still running {hang}:\n{text}")
        for rank in left:
            running[rank][0].take(0.1 / len(left))
        failed = [rank for rank, (fork, pid) in enumerate(running) if fork.ended.get(pid, (0, 0))[0]]
        if failed and end_together:
            end_together = False
            end = min(end, time.monotonic() + GRACE)
            hang = f"{GRACE} s after rank {failed[0]} had failed"


def _wiring(launcher: str, ranks: int, port: int) -> tuple[dict[str, str], Any]:
    """The variables a launcher would set, {rank} standing for the rank, and a server to be stopped at the end."""
    if launcher == "alone":
        assert ranks == 1
        return {}, None
    if launcher in ("deepspeed", "torchrun"):
        return {
            "RANK": "{rank}",
            "LOCAL_RANK": "{rank}",
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port or free_port()),
        }, None
    assert launcher == "horovodrun", launcher
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer(0)
    server_port = server.start()
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
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(server_port),
        "HOROVOD_GLOO_IFACE": "lo",
        # Milliseconds between two looks at what the other ranks want: looking every one takes half of a rank's time.
        "HOROVOD_CYCLE_TIME": "3",
        "PYTHONUNBUFFERED": "1",
    }, server


def free_port() -> int:
    """A port of this machine that nobody listens at, and that the kernel gives to no connection meanwhile."""
    end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    chance = random.SystemRandom()  # ranks and workers of other tests, with seeds of their own, draw others
    while True:
        port = chance.randrange(10_000, max(end, 10_001))
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            return port


def _serve() -> None:
    """The program of the process that forks ranks."""
    import gc

    global _answers
    _answers = os.dup(1)
    os.dup2(2, 1)  # imports print
    # Beside what a program imports, what DeepSpeed and the others import or load when they are used first: seconds of
    # every rank. Nothing here starts a thread, which a fork would lose.
    if importlib.util.find_spec("deepspeed"):  # launch/test_versions.sh does without the engines
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (torch's compiler, by a decorator)

        import arsg_dist.deepspeed
    if importlib.util.find_spec("horovod"):
        import horovod.torch  # noqa: F401

        import arsg_dist.horovod
    import matplotlib.figure
    import torch.utils.tensorboard  # noqa: F401

    import arsg_dist.ddp
    import arsg_dist.fsdp
    import arsg_dist.imagenet.cli  # noqa: F401
    from tests.support import fault_points  # noqa: F401

    with tempfile.TemporaryFile() as file:
        matplotlib.figure.Figure().savefig(file)
    assert threading.active_count() == 1, threading.enumerate()
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
        if not select.select([0], [], [], 0.02 if running else 1)[0]:
            continue
        read = os.read(0, 65536)
        if not read:
            break
        pending += read
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            if not line:
                continue
            here, pid = os.getpid(), os.fork()
            if not pid:
                _end_with(here)
                _be_a_rank(json.loads(line))
            running.add(pid)
            _say({"pid": pid})
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


_answers = 1
_PR_SET_PDEATHSIG = 1


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when the one that forked it has gone, however that went.

    Else ranks that wait for each other would do so for ever, with a core each, after an interrupted test session.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before
        os._exit(1)


def _say(answer: dict[str, Any]) -> None:
    os.write(_answers, (json.dumps(answer) + "\n").encode())


def _be_a_rank(request: dict[str, Any]) -> None:
    import faulthandler
    import resource
    import runpy

    os.setpgrp()  # a group of its own, with what it starts, as a terminal or a launcher gives a job
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(_answers)
    faulthandler.enable(2)
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    if request["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    from arsg_dist.engine import end_process
    from tests.support import fault_points

    sys.argv = [request["program"], *request["arguments"]]
    sys.path[0] = str(Path(request["program"]).parent)
    code = 1
    try:
        fault_points.install(request["faults"], Path(request["fault_file"]))
        # Kept until the end: a process group of torch's that goes waits for its threads while it holds Python's lock,
        # and a thread that gives back the last reference to a tensor waits for that lock.
        kept = runpy.run_path(request["program"], run_name="__main__")
        code = 0 if kept else 1
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    end_process(code)


if __name__ == "__main__":
    _serve()
