"""Ranks of an elastic job are killed for real, and hosts come and go: the weights are those of one process."""

from pathlib import Path

import pytest
import torch

from arsg_dist import ARSG, ObservationBoost
from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.horovod_elastic_job import BOOST_AT, UPDATES
from tests.support.launchers import launch

pytestmark = [pytest.mark.ranks]


def one_process() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after."""
    model = toy.build_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS | {"mu": 0.05})
    boost = ObservationBoost(optimizer, [BOOST_AT])
    for update in range(UPDATES):
        optimizer.zero_grad()
        inputs, targets = toy.batch(update)
        toy.loss_of(model(inputs), targets).backward()
        optimizer.step()
        boost.step()
    return before, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("scenario", "hosts", "world_sizes"),
    [
        # Update 4 is lost with the rank, and made again by the survivor alone.
        ("kill-rank-0", "localhost:1\n127.0.0.1:1\n", [2, 2, 2, 2, 1, 1, 1, 1]),
        pytest.param(
            "kill-rank-1", "localhost:1\n127.0.0.1:1\n", [2, 2, 2, 2, 1, 1, 1, 1], marks=pytest.mark.slow
        ),
        pytest.param("add", "localhost:1\n", [1, 1, 1, 1, 1, 2, 2, 2], marks=pytest.mark.slow),
        pytest.param(
            "remove", "localhost:1\n127.0.0.1:1\n", [2, 2, 2, 2, 2, 1, 1, 1], marks=pytest.mark.slow
        ),
    ],
)
def test_the_job_goes_on_as_one_process_would(
    scenario: str, hosts: str, world_sizes: list[int], tmp_path: Path
) -> None:
    """Catches a lost commit, state or boost, stale gradients of the interrupted update, and a job that starts over."""
    hosts_file, output = tmp_path / "hosts", tmp_path / "weights.pt"
    hosts_file.write_text(hosts)
    job = launch(
        "horovodrun",
        hosts.count("\n"),
        "tests/support/horovod_elastic_job.py",
        scenario,
        hosts_file,
        output,
        hosts_file=hosts_file,
    )
    assert output.exists(), job.output[-5000:]
    weights, sizes, mu = torch.load(output, weights_only=True)
    assert sizes == world_sizes, job.output[-5000:]
    assert mu == 0.1
    before, expected = one_process()
    assert_same_weights(weights, expected, started_from=before)
    assert job.code == 0, job.output[-5000:]
