"""A host dies, or falls silent: every job that had ranks there ends by itself."""

import time
from pathlib import Path

import pytest

from tests.cluster import slurm
from tests.cluster.rehearsal import Cluster, Running
from tests.cluster.starts import start
from tests.support.launchers import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]

JOB = str(REPOSITORY / "tests/support/endless_job.py")
# Each on hosts of its own pair would need more cores; sharing the hosts, all see the same fault.
STACKS = {  # name: target, engine, options
    "deepspeed-pdsh": ("deepspeed-pdsh", "deepspeed", []),
    "deepspeed-openmpi": ("deepspeed-openmpi", "deepspeed", ["--master-port", "29501"]),
    "mpirun-deepspeed": ("mpirun", "deepspeed", ["--engine", "deepspeed", "--master-port", "29502"]),
    "mpirun-horovod": ("mpirun", "horovod", ["--engine", "horovod"]),
    "horovodrun": ("horovodrun", "horovod", []),
}


def started(cluster: Cluster, tmp_path: Path) -> dict[str, Running]:
    """One job of every stack, with a rank on node1 and one on node4, all working."""
    jobs: dict[str, Running] = {}
    try:
        for stack, (target, engine, options) in STACKS.items():
            folder = tmp_path / stack
            folder.mkdir()
            program = [JOB, engine, str(folder)]
            hosts = ["--hosts", "node1:1,node4:1"]
            jobs[stack] = job = start(cluster, target, *hosts, *options, program=program, directory=folder)
            # One after the other: daemons of Open MPI that start on a host at the same time are not always well.
            end = time.monotonic() + 120
            while len([path for path in folder.iterdir() if path.name in ("0", "1")]) < 2:
                if job.ended() or time.monotonic() > end:
                    pytest.fail(f"{stack} did not come up:\n{job.stop()[-5000:]}")
                time.sleep(0.2)
    except BaseException:
        restart(cluster, jobs, ["node1", "node4"])
        raise
    return jobs


def restart(cluster: Cluster, jobs: dict[str, Running], names: list[str]) -> None:
    """Leaves nothing of the jobs, and the hosts as they were."""
    for job in jobs.values():
        job.kill()
    for name in names:
        if cluster.is_up(name):
            cluster.kill(name)
        cluster.boot(name)
    slurm.restore(cluster, *names)


def left_on(cluster: Cluster, name: str) -> str:
    """Ranks of the endless job that are still there."""
    shown = cluster.run_on(name, ["ps", "-eo", "pid,args"], timeout=60).output
    return "\n".join(line for line in shown.splitlines() if "endless_job.py" in line)


def ends(jobs: dict[str, Running], cluster: Cluster, seconds: float) -> None:
    """Every job fails within the time its launcher was given, and leaves no rank behind on the host that is well."""
    since = time.monotonic()
    running = dict(jobs)
    while running and time.monotonic() < since + seconds:
        for stack in [stack for stack, job in running.items() if job.ended()]:
            finished = running.pop(stack).wait(10)
            print(f"{stack}: ended {time.monotonic() - since:.0f} s after the fault")
            assert finished.code != 0, f"{stack} ended as if all were well:\n{finished.output[-3000:]}"
        time.sleep(0.5)
    still = {stack: job.stop() for stack, job in running.items()}
    assert not still, "\n".join(
        f"{stack} was still running:\n{output[-3000:]}" for stack, output in still.items()
    )
    end = time.monotonic() + 30
    while left := left_on(cluster, "node1"):
        assert time.monotonic() < end, f"ranks left behind:\n{left}"
        time.sleep(0.5)


@pytest.mark.turn(0)
def test_a_host_that_falls_silent_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """Catches a job that burns its allocation waiting for a host whose network is gone (no error, no packet)."""
    jobs = started(cluster, tmp_path)
    cluster.cut("node4")
    try:
        ends(jobs, cluster, 150)
    finally:
        cluster.join("node4")
        # What was cut off is ended with its host.
        restart(cluster, jobs, ["node4"])


@pytest.mark.turn(1)
def test_a_host_that_dies_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """Catches ranks that go on, or wait, when the host of another has lost power."""
    jobs = started(cluster, tmp_path)
    cluster.kill("node4")
    try:
        ends(jobs, cluster, 150)
    finally:
        restart(cluster, jobs, ["node4"])
