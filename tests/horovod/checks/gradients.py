"""Gradients between backward pass and update, and the memory they travel in."""

import copy
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

from arsg_dist import ARSG
from arsg_dist.horovod import ShardedOptimizer
from arsg_dist.horovod.comm.collectives import BufferPool
from tests.horovod.checks.common import (
    TwoDtypes,
    assert_equal,
    build,
    loss_of,
    plain_after,
    refused,
    update,
)
from tests.support import toy


def check_released_gradients_refuse() -> None:
    model, optimizer = build()
    loss_of(model).backward()
    with refused(RuntimeError, "optimizer.clip_grad_norm_(max_norm)"):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with refused(RuntimeError, "handed to its owner"):
        _ = model[0].weight.grad + 1
    with refused(RuntimeError, "before step(): other ranks already"):
        optimizer.zero_grad()
    with refused(RuntimeError, "is for between updates"):
        optimizer.set_backward_passes_per_step(2)
    with refused(RuntimeError, "call optimizer.zero_grad()"):
        loss_of(model).backward()
    with refused(RuntimeError, "call synchronize() before it"), optimizer.skip_synchronize():
        optimizer.step()
    optimizer.synchronize()
    optimizer.zero_grad()  # throws the update away
    assert_equal(model, toy.build_model())
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(model[0].weight.grad, torch.zeros_like(model[0].weight))
    update(model, optimizer)
    assert_equal(model, plain_after(1)[0])
    optimizer.close()


def check_passes_can_change() -> None:
    model, optimizer = build()
    optimizer.set_backward_passes_per_step(2)
    for _ in range(2):
        (loss_of(model) / 2).backward()
    optimizer.step()
    assert_equal(model, plain_after(1)[0])
    optimizer.zero_grad()
    optimizer.set_backward_passes_per_step(1)
    update(model, optimizer, 1)
    assert_equal(model, plain_after(2)[0])
    optimizer.close()


def check_settings_that_differ_are_refused_before_the_update() -> None:
    """A schedule fed with each rank's own loss would give every shard another learning rate, without a word."""
    if hvd.size() == 1:
        return
    model, optimizer = build()
    assert optimizer._parameter_names == {parameter: name for name, parameter in model.named_parameters()}
    update(model, optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.param_groups[0]["lr"] *= 0.5 if hvd.rank() == 1 else 1.0
    lr = toy.HYPERPARAMETERS["lr"]
    with refused(RuntimeError, f"lr of group 0 is {lr:g} on rank 0, {lr / 2:g} on rank 1. A schedule"):
        update(model, optimizer, 1)
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    assert_equal(model, plain_after(2)[0])
    optimizer.close()


def check_padding_is_no_overflow() -> None:
    """What an earlier exchange left in memory between a bucket's gradients, and behind them, does not skip updates."""
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(17, 7), nn.Tanh(), nn.Linear(7, 5))
    model, optimizer = build(copy.deepcopy(expected))
    assert any(
        len(p.layout.gaps(bucket.index)) > 1
        for p in optimizer.shards.partitions
        for bucket in p.layout.buckets
    )
    take = BufferPool.take

    def take_what_was_used_before(*arguments: Any) -> Tensor:
        return take(*arguments).fill_(float("inf"))

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BufferPool, "take", take_what_was_used_before)
        scaler.scale(loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 64.0
    update(expected, ARSG(expected.parameters(), **toy.HYPERPARAMETERS))
    assert_equal(model, expected)
    optimizer.close()


def check_grad_scaler_unscales_a_model_of_two_dtypes_once() -> None:
    """It asks once for each dtype, and each time for all gradients of the optimizer."""

    def train(sharded: bool) -> nn.Module:
        model = TwoDtypes()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if sharded:
            optimizer = ShardedOptimizer(optimizer, model.named_parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for number in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, number)).backward()
            scaler.step(optimizer)
            scaler.update()
        if sharded:
            optimizer.close()  # type: ignore[attr-defined]
        return model

    assert_equal(train(sharded=True), train(sharded=False))


def check_sparse_gradients() -> None:
    for dense in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(50, 3, sparse=True), nn.Linear(3, 2))
        optimizer = ShardedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), sparse_as_dense=dense
        )
        before = model[0].weight.detach().clone()
        loss = model(torch.tensor([3, 3, 7])).sum()
        if not dense:
            with refused(RuntimeError, "sparse gradient, which cannot be sharded"):
                loss.backward()
        else:
            loss.backward()
            optimizer.step()
            moved = (model[0].weight.detach() - before).abs().sum(1)
            assert moved.nonzero().flatten().tolist() == [3, 7]
        optimizer.close()


def check_exchange_memory_is_lent_once_and_comes_back() -> None:
    """No memory of an exchange is given to two at once, and after an update all of it can be used again."""
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = build(toy.build_model().to(dtype))
        pool, lent = optimizer.shards.partitions[0].gradients._pool, set[int]()
        take, give_back = pool.take, pool.give_back

        def watched_take(*arguments: Any, take: Any = take, lent: set[int] = lent) -> Tensor:
            tensor: Tensor = take(*arguments)
            assert tensor.data_ptr() not in lent
            lent.add(tensor.data_ptr())
            return tensor

        def watched_give_back(tensor: Tensor, give_back: Any = give_back, lent: set[int] = lent) -> None:
            lent.remove(tensor.data_ptr())
            give_back(tensor)

        pool.take, pool.give_back = watched_take, watched_give_back  # type: ignore[method-assign]
        for number in range(3):
            update(model, optimizer, number)
            optimizer.synchronize_parameters()
            assert not lent
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.synchronize()
        assert lent
        optimizer.zero_grad()  # an update thrown away
        assert not lent
        if dtype == torch.float32:
            arenas = {arena.untyped_storage().data_ptr() for arena in optimizer.shards.partitions[0].arenas}
            masters = {
                master.untyped_storage().data_ptr() for master in optimizer.shards.partitions[0].masters
            }
            assert masters == arenas, "fp32 parameters are there twice"
        optimizer.close()
