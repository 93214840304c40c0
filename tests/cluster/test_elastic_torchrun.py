"""`arsg-dist launch torchrun`: a rank killed, a host lost, a host added; nothing is lost but what no checkpoint has."""

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cluster.rehearsal import Cluster, Running
from tests.cluster.starts import start
from tests.cluster.test_faults import restart
from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.launchers import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]

SAVED_EVERY = 3
ELASTIC = ["--master-port", "29511", "--detect-seconds", "25", "--max-restarts", "5", "--min-hosts", "1"]


def updates(folder: Path) -> list[tuple[int, int]]:
    """Each update made so far, and by how many ranks."""
    path = folder / "log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(update), int(ranks)) for update, ranks in (line.split() for line in lines)]


def wait_for(what: Callable[[list[tuple[int, int]]], bool], folder: Path, *jobs: Running) -> None:
    end = time.monotonic() + 120
    while not what(updates(folder)):
        if jobs[0].ended() or time.monotonic() > end:
            pytest.fail(f"after {updates(folder)[-3:]}:\n" + "\n".join(job.stop()[-4000:] for job in jobs))
        time.sleep(0.2)


@pytest.mark.turn(1)
def test_what_is_lost_is_what_the_last_checkpoint_lacks(cluster: Cluster, tmp_path: Path) -> None:
    """Catches ranks of one start that wait for those of another, a host that is waited for though it is gone, one that
    joins and finds nobody, and a training that begins anew or skips a part of its data."""
    program = [str(REPOSITORY / "tests/cluster/jobs/elastic_training.py"), str(tmp_path)]
    most = ["--max-hosts", "2"]
    jobs = [
        start(
            cluster,
            "torchrun",
            "--hosts",
            "node1:1,node2:1",
            *ELASTIC,
            *most,
            program=program,
            directory=tmp_path,
        )
    ]
    try:
        wait_for(lambda made: len(made) >= 4 and made[-1][1] == 2, tmp_path, *jobs)
        before = len(updates(tmp_path))
        rank = f"^[^ ]*python -u {re.escape(' '.join(program))}"  # of this test alone, in the host's own processes
        killed = cluster.run_on("node2", ["pkill", "-KILL", "-f", "-o", rank], timeout=60)
        assert killed.code == 0, killed.output
        wait_for(lambda made: len(made) >= before + 6 and made[-1][1] == 2, tmp_path, *jobs)

        cluster.kill("node2")
        wait_for(lambda made: made[-1][1] == 1, tmp_path, *jobs)

        (tmp_path / "join").mkdir()
        joins = ["--join", "--master-addr", "node1", "--hosts", "node3:1"]
        jobs.append(
            start(
                cluster, "torchrun", *joins, *ELASTIC, *most, program=program, directory=tmp_path / "join", on="node3"
            )
        )  # fmt: skip
        wait_for(lambda made: made[-1][1] == 2, tmp_path, *jobs)
        (tmp_path / "stop").touch()
        for job in jobs:
            ended = job.wait(120)
            assert ended.code == 0, ended.output[-5000:]
    finally:
        restart(cluster, dict(enumerate(jobs)), ["node2"])  # type: ignore[arg-type]
    made = updates(tmp_path)
    for (last, _), (first, _) in itertools.pairwise(made):
        assert first == last + 1 or 0 <= last - (first - 1) <= SAVED_EVERY, made
    results = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = toy.build_model()
    assert_same_weights(
        results["weights"],
        toy.single_process_weights(results["update"]),
        started_from={name: parameter.detach().clone() for name, parameter in model.named_parameters()},
    )
