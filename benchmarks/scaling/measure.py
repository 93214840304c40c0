"""Measure collectives and training steps on rehearsal hosts with limited links, for `fit` to calibrate on.

The hosts are network namespaces of one machine (`tests/cluster/rehearsal.py`), one rank or two on each, and every cable
carries at most the rate given, in each direction. What each rank does is in `job`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import device_name
from benchmarks.scaling.job import RATES, wait_for

PLACES = {"torch": ((2, 1), (3, 1), (4, 1)), "horovod": ((1, 2), (2, 1), (3, 1), (4, 1), (2, 2))}
"""Hosts and ranks per host of every job."""


def measure(stack: str, hosts: int, per_host: int, directory: Path) -> list[dict[str, Any]]:
    """One job on its own hosts, at every rate."""
    from tests.cluster.rehearsal import NETWORK, Cluster
    from tests.cluster.starts import start

    cluster = Cluster(directory / "cluster", hosts, str(Path(sys.executable).parent))
    arguments = [str(Path(__file__).with_name("job.py")), stack, str(directory)]
    rows: list[dict[str, Any]] = []
    cluster.start()
    try:
        if stack == "torch":
            meeting = {"MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
            running = []
            for rank, name in enumerate(cluster.names):
                rank_only = {"WORLD_SIZE": str(hosts), "RANK": str(rank), "LOCAL_RANK": "0"}
                running.append(cluster.start_on(name, [sys.executable, *arguments], meeting | rank_only))
        else:
            places = ",".join(f"{name}:{per_host}" for name in cluster.names)
            options = ["--hosts", places, "--env", "HOROVOD_DYNAMIC_PROCESS_SETS=1"]
            running = [start(cluster, "horovodrun", *options, program=arguments, directory=directory)]

        def any_ended() -> bool:
            return any(process.ended() for process in running)

        try:
            for rank in range(hosts * per_host):
                wait_for(directory / f"ready{rank}", 120, any_ended)
            for rate in RATES:
                cluster.limit(rate)
                (directory / f"go{rate}").touch()
                wait_for(directory / f"done{rate}", 180, any_ended)
                place = {"stack": stack, "hosts": hosts, "per_host": per_host, "rate": rate}
                rows += [place | row for row in json.loads((directory / f"done{rate}").read_text())]
        except TimeoutError:
            print(*(process.stop()[-4000:] for process in running), sep="\n")
            raise
        cluster.limit(0)
        for process in running:
            process.wait(60)
    finally:
        cluster.stop()
    return rows


def main(stacks: list[str], numbers: list[int], output: Path) -> None:
    """Start the jobs of some stacks and numbers of hosts, and write what they found."""
    from tests.cluster.rehearsal import why_not

    if reason := why_not():
        raise SystemExit(reason)
    output.mkdir(parents=True, exist_ok=True)
    for stack in stacks:
        for hosts, per_host in [place for place in PLACES[stack] if place[0] in numbers]:
            with tempfile.TemporaryDirectory() as directory:
                begin = time.monotonic()
                rows = measure(stack, hosts, per_host, Path(directory))
            print(f"{stack}, {hosts} hosts × {per_host}: {time.monotonic() - begin:.0f} s", flush=True)
            for row in rows:
                if row["kind"] == "step":
                    print(f"  {row['rate']} Mbit/s {row['name']}: {statistics.median(row['seconds']):.3f} s")
            about = {
                "machine": device_name("cpu"),
                "torch": torch.__version__,
                "command": f"python -m benchmarks.scaling measure --stacks {stack} --hosts {hosts}",
            }
            rounded = [row | {"seconds": [round(s, 6) for s in row["seconds"]]} for row in rows]
            lines = ",\n".join(map(json.dumps, rounded))
            text = f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n'
            (output / f"{stack}-{hosts}x{per_host}.json").write_text(text)
