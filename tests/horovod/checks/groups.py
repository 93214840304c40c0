"""Parameter groups, hooks, schedulers and several optimizers."""

import copy
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from arsg_dist import ARSG
from arsg_dist.engine import JobError
from arsg_dist.horovod import ShardedOptimizer
from tests.horovod.checks.common import (
    OneWrongNumber,
    assert_equal,
    build,
    loss_of,
    plain_after,
    refused,
    update,
)
from tests.support import toy


def check_groups_can_be_added() -> None:
    def train(sharded: bool) -> nn.Module:
        model = toy.build_model()
        optimizer: torch.optim.Optimizer = ARSG(model[:3].parameters(), **toy.HYPERPARAMETERS)
        if sharded:
            names = [(n, p) for n, p in model.named_parameters() if not n.startswith("4")]
            optimizer = ShardedOptimizer(optimizer, names, bucket_mb=0.01)
        update(model, optimizer)
        optimizer.zero_grad()
        model.zero_grad()
        optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
        update(model, optimizer, 1, 2)
        if isinstance(optimizer, ShardedOptimizer):
            state = optimizer.state_dict()
            assert hvd.rank() or len(state["state"]) == 6
            optimizer.load_state_dict(state)
            update(model, optimizer, 3)
            with refused((ValueError, JobError), "more than one parameter group"):
                optimizer.add_param_group({"params": [model[4].weight]})
            optimizer.close()
        else:
            update(model, optimizer, 3)
        return model

    assert_equal(train(sharded=True), train(sharded=False))


def check_grad_scaler_sees_groups_added_later() -> None:
    """Their gradients are unscaled too, their overflow on one rank skips the update on all, and a rank that used none
    of them does not leave the others waiting."""

    def train(sharded: bool) -> nn.Module:
        model = toy.build_model()
        optimizer: torch.optim.Optimizer = ARSG(model[:3].parameters(), **toy.HYPERPARAMETERS)
        if sharded:
            optimizer = ShardedOptimizer(optimizer, model.named_parameters(), bucket_mb=0.01)
        optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for number in range(4):
            optimizer.zero_grad()
            inputs, targets = toy.batch(number)
            if number == 1 and (hvd.rank() == hvd.size() - 1 or not sharded):
                overflow = model[4].bias.register_hook(lambda gradient: gradient * float("inf"))
            if number == 2:  # the last rank alone uses the late parameters; one process, its share of them
                share = float(hvd.rank() == hvd.size() - 1) if sharded else 1 / hvd.size()
                loss = toy.loss_of(model[:4](inputs).sum(1, True), targets[:, :1])
                loss = loss + share * model[4](torch.ones(1, 67)).sum() if share else loss
            else:
                loss = loss_of(model, number)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if number == 1 and (hvd.rank() == hvd.size() - 1 or not sharded):
                overflow.remove()
        assert scaler.get_scale() == 32.0
        return model

    assert_equal(train(sharded=True), train(sharded=False))


def check_a_group_is_added_on_all_ranks_or_on_none() -> None:
    model = toy.build_model()
    frozen = nn.Linear(2, 2).requires_grad_(False)
    names = [*model.named_parameters(), *nn.ModuleDict({"frozen": frozen}).named_parameters()]
    optimizer = ShardedOptimizer(ARSG(model[:3].parameters(), **toy.HYPERPARAMETERS), names, bucket_mb=0.01)

    def refuses(kinds: Any, text: str, group: Any) -> None:
        with refused(kinds, text):
            optimizer.add_param_group({"params": group})
        assert (
            len(optimizer.param_groups)
            == len(optimizer.shards.trained)
            == len(optimizer.shards.partitions)
            == 1
        )

    late = list(model[4].parameters())
    if hvd.size() > 1:
        lost = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
        refuses((ValueError, JobError), "can be sharded", [lost] if hvd.rank() else late)
        refuses(ValueError, "differ from rank 0's", late[::-1] if hvd.rank() else late)
    OneWrongNumber.count, right = 0, optimizer.shards.reduction.reduce_scatter.exchange
    optimizer.shards.reduction.reduce_scatter.exchange = OneWrongNumber(right.group)
    refuses(RuntimeError, f"1 wrong numbers on rank {hvd.size() - 1}", late)
    optimizer.shards.reduction.reduce_scatter.exchange = right
    update(model, optimizer)
    optimizer.zero_grad()
    model.zero_grad()
    optimizer.add_param_group({"params": late})
    optimizer.add_param_group({"params": list(frozen.parameters())})  # as torch and Horovod take it
    # A checkpoint knows them by the names that every engine gives them.
    assert [spec.name for spec in optimizer.shards.specs] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in optimizer.shards.frozen] == ["frozen.weight", "frozen.bias"]
    update(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.close()
    expected = toy.build_model()
    plain = ARSG(expected[:3].parameters(), **toy.HYPERPARAMETERS)
    update(expected, plain)
    expected.zero_grad()
    plain.add_param_group({"params": list(expected[4].parameters())})
    update(expected, plain, 1)
    assert_equal(model, expected)


def check_names_of_groups() -> None:
    """Without named_parameters, parameters have the names that torch's groups give them."""
    model = toy.build_model()
    optimizer = ShardedOptimizer(torch.optim.SGD(model[:3].named_parameters(), lr=0.1), bucket_mb=0.01)
    with refused(ValueError, "taken by other parameters: 0.bias"):
        optimizer.add_param_group({"params": [("0.bias", model[4].bias)]})
    optimizer.add_param_group({"params": [("4.bias", model[4].bias)]})
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "4.bias"]
    assert [spec.name for spec in optimizer.shards.specs] == names
    optimizer.close()


def check_freezing_and_thawing() -> None:
    model, optimizer = build()
    update(model, optimizer)
    model[2].requires_grad_(False)
    frozen = model[2].weight.detach().clone()
    update(model, optimizer, 1)
    assert torch.equal(model[2].weight, frozen), "momentum or weight decay moved a frozen parameter"
    model[2].requires_grad_(True)
    update(model, optimizer, 2)
    assert not torch.equal(model[2].weight, frozen)
    optimizer.close()
    model = toy.build_model()
    model[0].requires_grad_(False)
    model, optimizer = build(model)
    model[0].requires_grad_(True)
    with refused(RuntimeError, "had requires_grad=False when ShardedOptimizer was made"):
        update(model, optimizer)
    optimizer.close()


def check_hooks_and_schedulers() -> None:
    model = toy.build_model()
    plain = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    schedule = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.5)  # made before: it changes the same groups
    calls: list[str] = []
    plain.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer = ShardedOptimizer(plain, model.named_parameters())
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    update(model, optimizer)
    everywhere.remove()
    assert calls == ["before", "after", "global"] or calls == ["before", "global", "after"], calls
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == toy.HYPERPARAMETERS["lr"] / 2
    with refused(TypeError, "cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    optimizer.close()


def check_two_optimizers_at_once() -> None:
    """As of a GAN: each updates its own half of what one backward pass computes."""
    model = toy.build_model()
    halves = [
        ShardedOptimizer(
            ARSG(half.parameters(), **toy.HYPERPARAMETERS), half.named_parameters(), bucket_mb=0.01
        )
        for half in (model[:2], model[2:])
    ]
    for number in range(3):
        for optimizer in halves:
            optimizer.zero_grad()
        loss_of(model, number).backward()
        for optimizer in halves if number % 2 else halves[::-1]:
            optimizer.step()
    assert_equal(model, plain_after(3)[0])
    for optimizer in halves:
        optimizer.close()
