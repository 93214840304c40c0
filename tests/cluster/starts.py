"""How the tests here start `arsg-dist launch` on a rehearsal host."""

import sys
import time
from pathlib import Path

from tests.cluster.rehearsal import Cluster, Running
from tests.support.launchers import REPOSITORY, Finished

_LAUNCH = (sys.executable, "-m", "arsg_dist.cli.main", "launch")


def start(
    cluster: Cluster, target: str, *options: str, program: list[str], directory: Path, on: str = "node1"
) -> Running:
    """Starts `arsg-dist launch TARGET OPTIONS -- PROGRAM` on a host."""
    # Every rank is to find this checkout, on whichever host and through whichever launcher.
    common = [
        "--directory",
        str(directory),
        "--env",
        f"PYTHONPATH={REPOSITORY}",
        "--env",
        "OMP_NUM_THREADS=1",
    ]
    return cluster.start_on(on, [*_LAUNCH, target, *options, *common, "--", *program])


def wait_for_batch_job(
    cluster: Cluster, submitted: Finished, directory: Path, timeout: float = 240
) -> Finished:
    """Waits for a job that `sbatch` has accepted; its exit code, and everything it printed."""
    assert submitted.code == 0, submitted.output
    number = submitted.output.split()[-1]
    end = time.monotonic() + timeout
    state: dict[str, str] = {}
    while time.monotonic() < end:
        shown = cluster.run_on("node1", ["scontrol", "show", "job", "-o", number], timeout=60).output
        state = dict(pair.partition("=")[::2] for pair in shown.split() if "=" in pair)
        if state.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            break
        time.sleep(0.5)
    else:
        cluster.run_on("node1", ["scancel", number], timeout=60)
    output = "".join(path.read_text(errors="replace") for path in sorted(directory.glob(f"*-{number}.out")))
    code = int(state.get("ExitCode", "1:0").partition(":")[0])
    assert state.get("JobState") in ("COMPLETED", "FAILED"), f"{state.get('JobState')}:\n{output[-5000:]}"
    return Finished(code, output)
