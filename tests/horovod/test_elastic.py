"""Ranks of an elastic job are killed for real, and hosts come and go: the weights are those of one process."""

import re
from pathlib import Path

import pytest
import torch

from arsg_dist import ObservationBoost
from tests.horovod.checks.common import plain_after, update
from tests.horovod.jobs.elastic_job import BOOST_AT, UPDATES
from tests.support.compare import REDUCTION_ORDER, assert_same_weights
from tests.support.launchers import launch

pytestmark = [pytest.mark.ranks]


def one_process() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after."""
    model, optimizer = plain_after(0, mu=0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    boost = ObservationBoost(optimizer, [BOOST_AT])
    for number in range(UPDATES):
        update(model, optimizer, number)
        boost.step()
    return before, {name: p.detach().clone() for name, p in model.named_parameters()}


TWO = "localhost:1\n127.0.0.1:1\n"
THREE = "localhost:1\n127.0.0.1:2\n"


@pytest.mark.parametrize(
    ("form", "scenario", "hosts", "world_sizes"),
    [
        # Update 4 is lost with the rank, and made again by the survivor alone.
        pytest.param("replicated", "kill-rank-0", TWO, [2, 2, 2, 2, 1, 1, 1, 1], marks=pytest.mark.turn(2)),
        pytest.param("sharded", "kill-rank-0", TWO, [2, 2, 2, 2, 1, 1, 1, 1], marks=pytest.mark.turn(0)),
        pytest.param("sharded", "kill-lone-rank", THREE, [3, 3, 3, 3, 2, 2, 2, 2], marks=pytest.mark.turn(0)),
        pytest.param("replicated", "kill-rank-1", TWO, [2, 2, 2, 2, 1, 1, 1, 1], marks=pytest.mark.turn(1)),
        pytest.param("sharded", "kill-rank-1", TWO, [2, 2, 2, 2, 1, 1, 1, 1], marks=pytest.mark.turn(2)),
        pytest.param(
            "replicated", "add", "localhost:1\n", [1, 1, 1, 1, 1, 3, 3, 3], marks=pytest.mark.turn(0)
        ),
        pytest.param("sharded", "add", "localhost:1\n", [1, 1, 1, 1, 1, 3, 3, 3], marks=pytest.mark.turn(1)),
        pytest.param("replicated", "remove", TWO, [2, 2, 2, 2, 2, 1, 1, 1], marks=pytest.mark.turn(2)),
        pytest.param("sharded", "remove", THREE, [3, 3, 3, 3, 3, 1, 1, 1], marks=pytest.mark.turn(0)),
        # Update 6 dies in its commit: updates 4 and 5 are made again.
        pytest.param("sharded", "kill-in-commit", TWO, [2, 2, 2, 2, 1, 1, 1, 1], marks=pytest.mark.turn(1)),
        pytest.param(
            "sharded-bf16", "kill-lone-rank", THREE, [3, 3, 3, 3, 2, 2, 2, 2], marks=pytest.mark.turn(2)
        ),
    ],
)
def test_the_job_goes_on_as_one_process_would(
    form: str, scenario: str, hosts: str, world_sizes: list[int], tmp_path: Path
) -> None:
    """Catches a lost commit, state or boost, stale gradients of the interrupted update, and a job that starts over.

    With a sharded optimizer also a shard that died with its rank, a commit of which a part is new and a part old, a
    layout for the old ranks, and names of exchanges that differ between old and new ranks (which would hang).
    """
    hosts_file, output = tmp_path / "hosts", tmp_path / "weights.pt"
    hosts_file.write_text(hosts)
    job = launch(
        "horovodrun",
        sum(int(slots) for slots in re.findall(r":(\d)\n", hosts)),
        "tests/horovod/jobs/elastic_job.py",
        form,
        scenario,
        hosts_file,
        output,
        hosts_file=hosts_file,
    )
    assert output.exists(), job.output[-5000:]
    weights, sizes, mu = torch.load(output, weights_only=True)
    assert sizes == world_sizes, job.output[-5000:]
    assert mu == 0.1
    assert "is the committed one" in job.output, job.output[-5000:]
    before, expected = one_process()
    if form == "sharded-bf16":  # gradients are rounded otherwise on every number of ranks
        weights = {name: weight.float() for name, weight in weights.items()}
    precision = 0.1 if form == "sharded-bf16" else REDUCTION_ORDER
    assert_same_weights(weights, expected, started_from=before, relative=precision)
    assert job.code == 0, job.output[-5000:]
