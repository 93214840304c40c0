"""What is each rank's own in a checkpoint: random states and running statistics."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from arsg_dist.checkpoint import SavedRun
from arsg_dist.checkpoint.writer import write_manifest, write_part
from arsg_dist.engine import EngineState, SingleProcessCommunicator
from arsg_dist.imagenet.training.rank_state import add_rank_state, load_rank_state, mean_buffers, seed_rank


class _Rank(SingleProcessCommunicator):
    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


def norm(value: float) -> nn.BatchNorm1d:
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(value)
    module.num_batches_tracked.fill_(int(value))
    return module


def saved(directory: Path, *values: float) -> SavedRun:
    """What so many ranks saved; each drew numbers of its own, the last of them an odd number of normal ones."""
    directory.mkdir()
    for rank, value in enumerate(values):
        seed_rank(0, rank)
        random.gauss(0, 1)
        np.random.normal()
        state = EngineState("single")
        add_rank_state(state, {"model": norm(value)}, rank)
        write_part(directory, rank, state)
    write_manifest(directory, len(values), EngineState("single"), {})
    return SavedRun(directory)


def drawn() -> list[float]:
    return [
        *(random.gauss(0, 1), random.random(), random.gauss(0, 1)),
        *(np.random.normal(), np.random.rand(), np.random.normal()),
        torch.rand(()).item(),
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_goes_on_with_its_own_numbers(rank: int, tmp_path: Path) -> None:
    """Catches rank 0's state on all ranks, and the second of a pair of normal numbers, which Python and NumPy keep."""
    run = saved(tmp_path / "run", 3.0, 5.0)
    seed_rank(0, rank)
    random.gauss(0, 1)
    np.random.normal()
    expected = drawn()
    seed_rank(9, rank)
    module = norm(0.0)
    assert load_rank_state(run, {"model": module}, _Rank(rank, 2), seed=0, update=4)
    assert drawn() == expected
    assert module.running_mean.tolist() == [3.0 + 2 * rank] * 2


def test_on_another_number_of_ranks_statistics_are_the_mean_and_numbers_are_new(tmp_path: Path) -> None:
    """Catches statistics of rank 0, or of as many ranks as there are now, and ranks that draw the same numbers, or
    those of the run's start again."""
    run = saved(tmp_path / "run", 1.0, 2.0, 6.0)
    seen = []
    for rank in range(2):
        module = norm(0.0)
        assert not load_rank_state(run, {"model": module}, _Rank(rank, 2), seed=0, update=4)
        assert module.running_mean.tolist() == [3.0, 3.0]
        assert module.num_batches_tracked.item() == 1
        seen.append(drawn())
    seed_rank(0, 0)
    seen.append(drawn())
    assert len({numbers[-1] for numbers in seen}) == 3


def test_an_evaluation_takes_the_mean_of_all_ranks_statistics(tmp_path: Path) -> None:
    """Catches statistics of rank 0, where validation takes their mean, and those of the average for the network's."""
    run = saved(tmp_path / "run", 1.0, 2.0, 6.0)
    found = mean_buffers(run, "model", norm(0.0))
    assert found["running_mean"].tolist() == [3.0, 3.0]
    assert found["num_batches_tracked"].item() == 1
    assert mean_buffers(run, "ema", norm(0.0)) == {}  # the network's own stay
