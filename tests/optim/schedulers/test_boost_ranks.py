"""ObservationBoost on two real ranks (gloo) that see different losses."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from arsg_dist import ARSG
from arsg_dist.engine import end_process
from arsg_dist.optim.schedulers.boost import ObservationBoost
from arsg_dist.optim.schedulers.loss_plateau import LossPlateau

torch.set_num_threads(1)
rank, store, reduction = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
optimizer = ARSG([torch.nn.Parameter(torch.ones(1))], lr=0.1, mu=0.05)
boost = ObservationBoost(
    optimizer,
    plateau=LossPlateau(0.0, threshold=0.05, patience=0),
    reduce=(lambda totals: totals) if reduction == "none" else None,
)
mus = []
for step in range(8):
    if rank == 0:  # flat on its own from step 2 on
        boost.record(1.0 if step == 0 else 0.5)
    elif step != 3:  # falls longer, and records nothing in step 3
        boost.record(max(0.1, 2.0 - 0.4 * step))
    optimizer.step()
    boost.step()
    mus.append(optimizer.param_groups[0]["mu"])
print(mus)
dist.destroy_process_group()
end_process(0)
"""


def run_two_ranks(tmp_path: Path, reduction: str) -> list[list[float]]:
    store = tmp_path / reduction
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(store), reduction],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return [[float(mu) for mu in stdout.strip().strip("[]").split(",")] for stdout, _ in outputs]


@pytest.mark.ranks
def test_ranks_with_different_losses_decide_alike(tmp_path: Path) -> None:
    """Catches a decision from the local loss: ranks would train with different μ and lr from then on.

    Also catches a rank without a record that leaves the others waiting. The mean falls by more than 5 % up to
    step 5 (in step 3 it is rank 0's alone) and is flat in step 6.
    """
    means = [(1.0 + 2.0) / 2, (0.5 + 1.6) / 2, (0.5 + 1.2) / 2, 0.5, (0.5 + 0.4) / 2, (0.5 + 0.1) / 2]
    flat_from = len(means)
    expected = [0.05] * flat_from + [0.1] * (8 - flat_from)
    assert run_two_ranks(tmp_path, "default") == [expected, expected]


@pytest.mark.turn(0)
@pytest.mark.ranks
def test_without_reduction_the_same_losses_split_the_ranks(tmp_path: Path) -> None:
    """Shows that the losses of the test above do need the reduction."""
    first, second = run_two_ranks(tmp_path, "none")
    assert first != second
