"""Job for one of four ranks: optimizers of some of the ranks, in both forms, and of all.

usage: process_sets_job.py
"""

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from arsg_dist import ARSG
from arsg_dist.horovod import DistributedOptimizer, ShardedOptimizer
from tests.horovod.checks.common import plain_after, update
from tests.horovod.jobs import run_job
from tests.support import toy
from tests.support.compare import assert_same_weights

UPDATES = 3


def build(process_set: Any, form: Callable[..., Any], **arguments: Any) -> tuple[nn.Module, Any]:
    model = toy.build_model()
    optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    named = list(model.named_parameters())
    return model, form(optimizer, named, process_set=process_set, **arguments)


def train(model: nn.Module, optimizer: Any, process_set: Any, first: int, updates: int) -> None:
    """On this rank's share, among the set's ranks, of the batches `first` and following."""
    rows = toy.BATCH // process_set.size()
    share = slice(process_set.rank() * rows, (process_set.rank() + 1) * rows)
    for number in range(first, first + updates):
        optimizer.zero_grad()
        inputs, targets = toy.batch(number)
        toy.loss_of(model(inputs[share]), targets[share]).backward()
        optimizer.step()


def assert_as_one_process(model: nn.Module, first: int, updates: int) -> None:
    alone, optimizer = plain_after(0)
    start = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    update(alone, optimizer, *range(first, first + updates))
    assert_same_weights(model.state_dict(), alone.state_dict(), started_from=start)


def check_an_optimizer_of_some_ranks_and_one_of_all(sets: list[Any]) -> None:
    """As many optimizers on one rank as on another, or not: exchanges of all ranks have the same name on each."""
    first_two = sets[0]
    if first_two.included():
        model, optimizer = build(first_two, ShardedOptimizer, bucket_mb=0.01)
        train(model, optimizer, first_two, 0, 1)
    everybody, of_all = build(hvd.global_process_set, ShardedOptimizer, bucket_mb=0.01)
    train(everybody, of_all, hvd.global_process_set, 5, UPDATES)
    assert_as_one_process(everybody, 5, UPDATES)
    of_all.close()
    if first_two.included():
        train(model, optimizer, first_two, 1, UPDATES - 1)
        assert_as_one_process(model, 0, UPDATES)
        optimizer.close()
    with pytest.raises(ValueError, match="is not registered"):
        build(hvd.ProcessSet([0, 2]), ShardedOptimizer)


def check_two_sets_train_at_once(sets: list[Any]) -> None:
    """Ranks 1 and 2 on other batches than ranks 0 and 3, in both forms."""
    middle, outer = sets[1:]
    mine, other, first = (middle, outer, 0) if middle.included() else (outer, middle, 9)
    for form in (DistributedOptimizer, ShardedOptimizer):
        model, optimizer = build(mine, form)
        train(model, optimizer, mine, first, UPDATES)
        assert_as_one_process(model, first, UPDATES)
    with pytest.raises(ValueError, match="construct ShardedOptimizer on its ranks only"):
        build(other, ShardedOptimizer)
    # "Rank 0" of a state is the set's first rank.
    state = optimizer.state_dict()
    assert bool(state["state"]) == (mine.rank() == 0) == (hvd.rank() in (0, 1))
    optimizer.load_state_dict(state if mine.rank() == 0 else None)
    train(model, optimizer, mine, first + UPDATES, 1)
    assert_as_one_process(model, first, UPDATES + 1)
    optimizer.close()


def check_ranks_outside_the_set_train_by_themselves(sets: list[Any]) -> None:
    """Horovod's test_optimizer_process_sets: every rank makes the optimizer, with plain Horovod's values."""
    first_two, models = sets[0], []
    for name, form in (("ours", DistributedOptimizer), ("theirs", hvd.DistributedOptimizer)):
        model = toy.build_model()
        models.append(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        named = [(f"{name}.{place}", parameter) for place, parameter in model.named_parameters()]
        optimizer = form(optimizer, named, process_set=first_two)
        for number in range(UPDATES):
            optimizer.zero_grad()
            inputs, targets = toy.batch(number + 5 * hvd.rank())
            toy.loss_of(model(inputs), targets).backward()
            optimizer.step()
    assert_same_weights(
        models[0].state_dict(),
        models[1].state_dict(),
        started_from=toy.build_model().state_dict(),
        relative=0,
    )
    of_ranks = hvd.allgather_object(models[0][4].bias.detach())
    assert [[bool((a == b).all()) for a in of_ranks] for b in of_ranks] == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


CHECKS = (
    check_an_optimizer_of_some_ranks_and_one_of_all,
    check_two_sets_train_at_once,
    check_ranks_outside_the_set_train_by_themselves,
)


def main() -> None:
    sets = [hvd.add_process_set(ranks) for ranks in ([0, 1], [1, 2], [0, 3])]
    for check in CHECKS:
        check(sets)
        if hvd.rank() == 0:
            print("done:", check.__name__, flush=True)


if __name__ == "__main__":
    run_job(main)
