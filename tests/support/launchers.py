"""Starts real ranks, through the real launchers or forked from processes that are warm."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.warm_ranks import REPOSITORY, free_port, python_path, warm_ranks, without_core


@dataclass(frozen=True)
class Finished:
    """A job that ended by itself.

    Attributes:
        code: exit code of the launcher.
        output: stdout and stderr of all ranks, together.
    """

    code: int
    output: str


def launch(
    launcher: str,
    ranks: int,
    script: str | Path,
    *arguments: object,
    timeout: float = 500,
    largest_file: int | None = None,
    variables: Mapping[str, str] | None = None,
    hosts_file: Path | None = None,
) -> Finished:
    """Runs a script on several ranks of this machine and waits for the end.

    Args:
        launcher: "torchrun", "deepspeed", "deepspeed --module" (`script` is a module then), "mpirun", "horovodrun"
            (over Gloo), "horovodrun, two hosts" (two names of this machine with half of the ranks each) or "alone" (one
            process, no launcher). "warm torchrun", "warm deepspeed", "warm horovodrun" and "warm alone" start in a
            moment, for tests that ask nothing of the launcher: the ranks have its variables. When one fails, the
            others must end by themselves.
        ranks: how many.
        script: relative to the repository, or absolute.
        arguments: of the script.
        timeout: seconds, besides those in which it had no core; a job that takes longer is killed and the test fails,
            since that is a hang.
        largest_file: bytes; writing more to a file fails, as on a full disk.
        variables: more environment variables.
        hosts_file: lines "host:slots", all of them this machine; the job is elastic and follows the file's changes.
    """
    port = free_port()
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": python_path()}
    # Where the cores are shared: 30 s is little, and a rank that waits would keep a core from the others. Horovod looks
    # every so many milliseconds at what the other ranks want: every one, and that is half of what a rank does.
    environment.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", "120")
    environment.setdefault("HOROVOD_CYCLE_TIME", "3")
    environment.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= variables or {}
    try:
        if launcher.startswith("warm "):
            job = warm_ranks().run_program(
                launcher.removeprefix("warm "),
                script,
                *arguments,
                environment=environment,
                ranks=ranks,
                timeout=timeout,
                port=port,
                largest_file=largest_file,
                end_together=True,
            )
            finished = Finished(job.code, job.output)
        else:
            target = str(script) if launcher.endswith("--module") else str(REPOSITORY / script)
            command = _elastic_command(ranks, hosts_file) if hosts_file else _command(launcher, ranks, port)
            finished = _run([*command, target, *map(str, arguments)], environment, timeout, largest_file)
    finally:
        left = list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
        for path in left:
            path.unlink()
    assert not left or finished.code, f"the job left shared memory behind: {left}"
    return finished


def _run(
    command: list[str], environment: dict[str, str], timeout: float, largest_file: int | None
) -> Finished:
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file)) if largest_file else None
        ),
    )
    begin, limit = time.monotonic(), timeout
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=max(1.0, begin + limit - time.monotonic()))
                return Finished(process.returncode, output)
            except subprocess.TimeoutExpired:
                limit = timeout + without_core([process.pid])
                if time.monotonic() < begin + limit:
                    continue
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                raise AssertionError(
                    f"{' '.join(command)} was still running after {timeout} s:\n{output[-5000:]}"
                ) from None
    except KeyboardInterrupt:  # an interrupted session leaves no job
        os.killpg(process.pid, signal.SIGTERM)  # by which a launcher ends its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def _command(launcher: str, ranks: int, port: int) -> list[str]:
    if launcher == "alone":
        assert ranks == 1
        return [sys.executable]
    if launcher.startswith("deepspeed"):
        options = ["--num_accelerators", str(ranks), "--master_port", str(port)]
        return ["deepspeed", *options, *launcher.split()[1:]]
    if launcher == "torchrun":
        meeting = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        return ["torchrun", "--nproc-per-node", str(ranks), *meeting]
    if launcher == "horovodrun":
        return ["horovodrun", "-np", str(ranks), "-H", f"localhost:{ranks}", "--gloo", sys.executable]
    if launcher == "horovodrun, two hosts":
        hosts = f"localhost:{ranks // 2},127.0.0.1:{ranks // 2}"
        return [
            *("horovodrun", "-np", str(ranks), "-H", hosts, "--network-interface", "lo", "--gloo"),
            sys.executable,
        ]
    assert launcher == "mpirun", launcher
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", *as_root, "--oversubscribe", "--bind-to", "none", "-np", str(ranks), sys.executable]


def _elastic_command(ranks: int, hosts_file: Path) -> list[str]:
    discovery = hosts_file.with_suffix(".sh")
    discovery.write_text(f"#!/bin/sh\ncat {hosts_file}\n")
    discovery.chmod(0o755)
    sizes = ["-np", str(ranks), "--min-np", "1", "--max-np", "3"]
    found = ["--host-discovery-script", str(discovery), "--network-interface", "lo", "--gloo"]
    return ["horovodrun", *sizes, *found, sys.executable]
