"""Job for one rank: what a Horovod user does beside training, and what must be refused, on a sharded optimizer.

usage: horovod_sharded_checks_job.py [NAME OF A CHECK]...
"""

import copy
import gc
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from horovod.torch import mpi_ops
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from arsg_dist import ARSG
from arsg_dist.engine import JobError, end_process
from arsg_dist.horovod import ShardedOptimizer, exchange, group, parameter_gather, self_test, sharded
from arsg_dist.horovod.buffer_pool import BufferPool
from arsg_dist.horovod.exchange import AllToAllReduceScatter, choose_reduce_scatter
from arsg_dist.horovod.group import Group
from tests.support import toy
from tests.support.horovod_checks import run_checks

SETTINGS = toy.HYPERPARAMETERS


def build(model: nn.Module | None = None, **arguments: Any) -> tuple[nn.Module, ShardedOptimizer]:
    model = toy.build_model() if model is None else model
    optimizer = ARSG(model.parameters(), **SETTINGS)
    return model, ShardedOptimizer(optimizer, model.named_parameters(), **{"bucket_mb": 0.01, **arguments})


def update(model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    optimizer.zero_grad()
    inputs, targets = toy.batch(number)
    dtype = next(model.parameters()).dtype
    toy.loss_of(model(inputs.to(dtype)), targets.to(dtype)).backward()
    optimizer.step()


@contextmanager
def refused(kinds: Any, text: str) -> Iterator[None]:
    with pytest.raises(kinds) as raised:
        yield
    assert text in str(raised.value), f"{text!r} is not in: {raised.value}"


def plain_after(updates: int, **settings: Any) -> tuple[nn.Module, ARSG]:
    model = toy.build_model()
    optimizer = ARSG(model.parameters(), **{**SETTINGS, **settings})
    for number in range(updates):
        update(model, optimizer, number)
    return model, optimizer


def assert_equal(actual: nn.Module | dict[str, Tensor], expected: nn.Module | dict[str, Tensor]) -> None:
    actual = actual if isinstance(actual, dict) else actual.state_dict()
    expected = expected if isinstance(expected, dict) else expected.state_dict()
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(actual[name], expected[name], rtol=1e-4, atol=1e-6), name


# Readers. The exchange is made to write at the last moment, so that whoever does not wait reads old values.


@contextmanager
def late_exchange() -> Iterator[None]:
    start = parameter_gather.start_all_gather

    def late(
        group: Group, shard: Tensor, bucket: Tensor, name: str, number: int, pool: BufferPool
    ) -> exchange.Started:
        arrived = torch.empty_like(bucket)
        started = start(group, shard, arrived, name, number, pool)
        return exchange.Started(started.handle, lambda output: bucket.copy_(started.result(output)))

    parameter_gather.start_all_gather = late
    try:
        yield
    finally:
        parameter_gather.start_all_gather = start


class Reader(nn.Module):
    """Modules that read weights in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(17, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.past = nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).unsqueeze(0)
        hidden = self.attention(hidden, hidden, hidden)[0]
        hidden = self.normed(self.recurrent(hidden)[0])
        outputs: Tensor = functional.linear(hidden, self.past.weight, self.past.bias)
        return outputs[0]


def check_readers_wait() -> None:
    """Every way of reading through modules, against an eager twin."""
    readers: dict[str, Callable[[nn.Module], Any]] = {
        "forward": lambda m: m(toy.batch(7)[0]),
        "eval": lambda m: m.eval()(toy.batch(7)[0]),
        "state_dict": lambda m: torch.cat([t.flatten() for t in m.state_dict().values()]),
        "parameters": lambda m: torch.cat([p.detach().flatten() for p in m.parameters()]),
        "attribute": lambda m: m.past.weight.detach(),
        "deepcopy": lambda m: torch.cat([p.detach().flatten() for p in copy.deepcopy(m).parameters()]),
        "compiled": lambda m: torch.compile(m, backend="eager")(toy.batch(7)[0]),
    }
    # The last one: from then on step() waits, since compiled code cannot be watched.
    assert list(readers)[-1] == "compiled"
    twin, eager = build(Reader(), gather="eager")
    model, lazy = build(Reader())
    with late_exchange():
        for number, (name, read) in enumerate(readers.items()):
            for m, optimizer in ((twin, eager), (model, lazy)):
                m.train()
                update(m, optimizer, number)
            assert lazy._pending.started, f"{name}: nothing to wait for, so the comparison would show nothing"
            assert not eager._pending.started
            stale = torch.cat([a.view(-1).clone() for p in lazy._partitions for a in p.arenas])
            assert torch.equal(read(model), read(twin)), name
            lazy.synchronize_parameters()
            fresh = torch.cat([a.view(-1) for p in lazy._partitions for a in p.arenas])
            # The parts a rank owns are its fp32 masters, updated in place: alone it waits for no data.
            assert hvd.size() == 1 or not torch.equal(stale, fresh), f"{name}: the update was already there"
        update(model, lazy, 9)
        assert not lazy._pending.started, "not awaited under torch.compile"
    eager.close()
    lazy.close()
    for module in model.modules():
        assert type(module.__dict__["_parameters"]) is dict


def check_parameters_without_module_wait() -> None:
    """Parameters of no module are there when step() returns."""
    weight = torch.ones(1000, requires_grad=True)
    optimizer = ShardedOptimizer(torch.optim.SGD([weight], lr=0.1), [("weight", weight)])
    with late_exchange():
        (weight * torch.arange(1000.0)).sum().backward()
        optimizer.step()
        assert optimizer._pending.lazy
        assert torch.allclose(weight.detach(), 1 - 0.1 * torch.arange(1000.0), atol=1e-4)
    optimizer.close()


def check_param_groups_wait() -> None:
    """Going through the groups waits; clearing gradients does not."""
    model, optimizer = build()
    with late_exchange():
        update(model, optimizer)
        optimizer.zero_grad()
        assert optimizer._pending.started
        read = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
        update(model, optimizer, 1)
        last = optimizer.param_groups[0]["params"][-1].detach().clone()
    for number, tensors in ((1, read[0]), (2, [last])):
        for tensor, expected in zip(
            tensors[::-1], [*plain_after(number)[0].parameters()][::-1], strict=False
        ):
            assert torch.allclose(tensor, expected, rtol=1e-4, atol=1e-6)
    assert type(copy.copy(optimizer.param_groups[0]["params"])) is list
    optimizer.close()


def check_one_module_of_two_optimizers() -> None:
    """Readers wait for both."""
    model = toy.build_model()
    weights = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    biases = [(name, p) for name, p in model.named_parameters() if p.dim() == 1]
    optimizers = [
        ShardedOptimizer(ARSG([p for _, p in half], **SETTINGS), half, bucket_mb=0.01)
        for half in (weights, biases)
    ]
    with late_exchange():
        inputs, targets = toy.batch(0)
        toy.loss_of(model(inputs), targets).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(optimizer._pending.started for optimizer in optimizers)
        assert_equal(model, plain_after(1)[0])
    for optimizer in optimizers:
        assert all(type(module.__dict__["_parameters"]) is not dict for module in model[::2])
        optimizer.close()
    assert all(type(module.__dict__["_parameters"]) is dict for module in model[::2])


# Models that outlive their optimizer


def trained_in_a_function(**arguments: Any) -> nn.Module:
    """As everybody writes it: the optimizer ends its life with the function."""
    model, optimizer = build(**arguments)
    for number in range(2):
        update(model, optimizer, number)
    return model


def hold_back_update(optimizer: ShardedOptimizer, until: Callable[[], Any]) -> None:
    """Makes this rank slow: it sends parameters only after a call has returned."""
    update = optimizer._inner.step

    def late() -> None:
        until()
        update()

    optimizer._inner.step = late  # type: ignore[method-assign]


def check_the_model_outlives_its_optimizer() -> None:
    """Readers wait for the last update's parameters when nobody holds the optimizer any more."""
    expected = plain_after(2)[0]
    readers: dict[str, Callable[[nn.Module], Any]] = {
        "state_dict": lambda m: list(m.state_dict().values()),
        "parameters": lambda m: [p.detach() for p in m.parameters()],
        "forward": lambda m: [m(toy.batch(7)[0]).detach()],
        "deepcopy": lambda m: list(copy.deepcopy(m).state_dict().values()),
        "attribute": lambda m: [m[0].weight.detach(), m[4].bias.detach()],
    }
    for name, read in readers.items():
        for gather in ("lazy", "eager"):
            with late_exchange():
                model = trained_in_a_function(gather=gather)
                gc.collect()
                for actual, right in zip(read(model), read(expected), strict=True):
                    assert torch.allclose(actual, right, rtol=1e-4, atol=1e-6), (name, gather)
    assert not mpi_ops._handle_map


def check_a_model_and_its_optimizer_free_everything() -> None:
    """Also on a rank that drops both while the others have not even begun to send the parameters, who get them all
    the same."""
    model, optimizer = build()
    update(model, optimizer)  # the first one is collective
    optimizer.zero_grad()
    alone = weakref.ref(optimizer)
    arenas = [StorageWeakRef(a.untyped_storage()) for p in optimizer._partitions for a in p.arenas]
    pending = weakref.ref(optimizer._pending)
    inputs, targets = toy.batch(1)
    toy.loss_of(model(inputs), targets).backward()
    if hvd.rank() == 0:
        optimizer.step()
        optimizer.zero_grad()
        assert hvd.size() == 1 or optimizer._pending.started
        compiler_callbacks = len(torch._dynamo.callback.callback_handler.start_callbacks)
        del optimizer
        assert alone() is None, "an optimizer without a schedule is in no circle"
        assert pending() is not None, "it goes with the optimizer, and nobody waits"
        del model
        assert pending() is None, "not freed with the model"
        assert len(torch._dynamo.callback.callback_handler.start_callbacks) == compiler_callbacks - 1
        assert not mpi_ops._handle_map, "Horovod keeps the memory of an exchange that nobody waits for"
        hvd.allgather_object(None, name="rank 0 has dropped everything")
    else:
        hold_back_update(optimizer, lambda: hvd.allgather_object(None, name="rank 0 has dropped everything"))
        optimizer.step()
        assert_equal(model, plain_after(2)[0])
        optimizer.zero_grad()
        del model, optimizer
    del inputs, targets
    gc.collect()  # an update held back is in a circle
    hvd.allgather_object(None, name="all have")
    assert all(arena.expired() for arena in arenas)


def check_a_new_optimizer_takes_over() -> None:
    """It starts from the parameters that were on their way, and the old one's hooks are gone."""
    model, expected = toy.build_model(), toy.build_model()
    parameters = list(model.parameters())  # read before: no module waits when the next optimizers are made
    for in_a_circle in (False, True):  # which only the garbage collector takes apart
        with late_exchange():
            optimizer = ShardedOptimizer(
                torch.optim.SGD(parameters, lr=1e-3), model.named_parameters(), bucket_mb=0.01
            )
            optimizer.__dict__["itself"] = optimizer if in_a_circle else None
            update(model, optimizer)
            assert optimizer._pending.started
            del optimizer
            optimizer = ShardedOptimizer(torch.optim.SGD(parameters, lr=1e-3), bucket_mb=0.01)
            update(model, optimizer, 1)
        reference = torch.optim.SGD(expected.parameters(), lr=1e-3)
        for number in range(2):
            update(expected, reference, number)
        assert_equal(model, expected)
        assert all(len(module._forward_pre_hooks) == 1 for module in model[::2])
        assert all(len(p._post_accumulate_grad_hooks) == 1 for p in parameters)
        optimizer.close()


def check_an_optimizer_dropped_in_the_middle_of_an_update() -> None:
    """Its gradients are refused as before, and cleared the model is as good as new."""
    model, optimizer = build()
    inputs, targets = toy.batch(0)
    toy.loss_of(model(inputs), targets).backward()
    del optimizer
    gc.collect()
    assert not mpi_ops._handle_map
    plain = ARSG(model.parameters(), **SETTINGS)
    with refused(RuntimeError, "call optimizer.zero_grad()"):
        plain.step()
    for number in range(2):
        update(model, plain, number)
    assert_equal(model, plain_after(2)[0])
    update(*(again := build(model)))
    again[1].close()
    hvd.barrier()


# Gradients


def check_released_gradients_refuse() -> None:
    model, optimizer = build()
    inputs, targets = toy.batch(0)
    toy.loss_of(model(inputs), targets).backward()
    with refused(RuntimeError, "optimizer.clip_grad_norm_(max_norm)"):
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with refused(RuntimeError, "handed to its owner"):
        _ = model[0].weight.grad + 1
    with refused(RuntimeError, "before step(): other ranks already"):
        optimizer.zero_grad()
    with refused(RuntimeError, "is for between updates"):
        optimizer.set_backward_passes_per_step(2)
    with refused(RuntimeError, "call optimizer.zero_grad()"):
        toy.loss_of(model(inputs), targets).backward()
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
    inputs, targets = toy.batch(0)
    for _ in range(2):
        (toy.loss_of(model(inputs), targets) / 2).backward()
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
    lr = SETTINGS["lr"]
    with refused(RuntimeError, f"lr of group 0 is {lr:g} on rank 0, {lr / 2:g} on rank 1. A schedule"):
        update(model, optimizer, 1)
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    assert_equal(model, plain_after(2)[0])
    optimizer.close()


def check_padding_is_no_overflow() -> None:
    """What an earlier exchange left in memory behind a bucket's last gradient does not skip updates."""
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(17, 7), nn.Tanh(), nn.Linear(7, 5))
    model, optimizer = build(copy.deepcopy(expected))
    assert any(
        used < bucket.numel
        for p in optimizer._partitions
        for used, bucket in zip(p.gradients._used, p.layout.buckets, strict=True)
    )
    take = BufferPool.take

    def take_what_was_used_before(*arguments: Any) -> Tensor:
        return take(*arguments).fill_(float("inf"))

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BufferPool, "take", take_what_was_used_before)
        inputs, targets = toy.batch(0)
        scaler.scale(toy.loss_of(model(inputs), targets)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 64.0
    update(expected, ARSG(expected.parameters(), **SETTINGS))
    assert_equal(model, expected)
    optimizer.close()


def check_pieces_of_a_loaded_parameter_count_their_own_steps() -> None:
    """Torch's step tensors: one that all pieces of a parameter share is counted up by each of them."""

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-2)

    model, expected = toy.build_model(), toy.build_model()
    plain = adamw(expected)
    optimizer = ShardedOptimizer(adamw(model), model.named_parameters(), bucket_mb=0.002)
    for number in range(2):
        update(expected, plain, number)
        update(model, optimizer, number)
        state = optimizer.state_dict()
        if hvd.rank() == 0:
            assert [float(entry["step"]) for entry in state["state"].values()] == [number + 1.0] * 6
        for given in (state, hvd.broadcast_object(state, root_rank=0)):
            optimizer.load_state_dict(given)
    assert_equal(model, expected)
    optimizer.close()


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


# Memory


def check_exchange_memory_is_lent_once_and_comes_back() -> None:
    """No memory of an exchange is given to two at once, and after an update all of it can be used again."""
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = build(toy.build_model().to(dtype))
        pool, lent = optimizer._partitions[0].gradients._pool, set[int]()
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
        toy.loss_of(model(toy.batch(0)[0].to(dtype)), toy.batch(0)[1].to(dtype)).backward()
        optimizer.synchronize()
        assert lent
        optimizer.zero_grad()  # an update thrown away
        assert not lent
        if dtype == torch.float32:
            arenas = {arena.untyped_storage().data_ptr() for arena in optimizer._partitions[0].arenas}
            masters = {master.untyped_storage().data_ptr() for master in optimizer._partitions[0].masters}
            assert masters == arenas, "fp32 parameters are there twice"
        optimizer.close()


# Parameters written by others


def check_masters_of_a_half_precision_run_leave_fp32_parameters_alone() -> None:
    """Loading them moves no parameter, and above all not this rank's part only."""
    half, optimizer = build(toy.build_model().to(torch.bfloat16))
    update(half, optimizer)
    state = optimizer.state_dict()
    optimizer.close()
    for given in (state, hvd.broadcast_object(state, root_rank=0)):
        model, optimizer = build()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer.load_state_dict(given)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        optimizer.close()


def check_written_parameters_are_kept() -> None:
    """Loaded, broadcast and clamped parameters are trained on; the rest keeps its master's precision."""
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = build(toy.build_model().to(dtype))
        update(model, optimizer)
        loaded = {name: tensor.clone() + 0.5 for name, tensor in model.state_dict().items()}
        model.load_state_dict(loaded)
        with optimizer.base_iterate():
            pass
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
        for master in (m for p in optimizer._partitions for m in p.masters):
            assert master.dtype == torch.float32
        if hvd.rank():
            with torch.no_grad():
                model[0].weight.fill_(3.0)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        with optimizer.base_iterate():
            pass
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
        with torch.no_grad():
            model[0].bias.clamp_(0.0, 0.1)
        clamped = model[0].bias.detach().clone()
        for settings in optimizer.param_groups:
            settings["lr"] = 0.0
        update(model, optimizer)
        assert torch.equal(model[0].bias, clamped)
        optimizer.close()


def check_memory_replaced() -> None:
    model, optimizer = build()
    model[2].weight.data = model[2].weight.data.clone()
    with refused(RuntimeError, "the memory of 2.weight was replaced"):
        update(model, optimizer)
    optimizer.close()


def last_ranks() -> str:
    return ", ".join(map(str, range(1, hvd.size())))


def check_ranks_that_differ() -> None:
    if hvd.size() == 1:
        return  # nobody to differ from
    model = toy.build_model()
    with torch.no_grad():
        model[4].bias[2] += hvd.rank()
    model, optimizer = build(model)
    with refused(RuntimeError, "hvd.broadcast_parameters(model.state_dict(), root_rank=0)"):
        update(model, optimizer)
    optimizer.close()
    other = nn.Linear(3, 2 + hvd.rank())
    with refused((ValueError, JobError), "differ from rank 0's"):
        build(other)
    with refused((ValueError, JobError), "bucket_mb"):
        build(bucket_mb=-1.0 if hvd.rank() else 1.0)
    for what, arguments in {
        "or bucket_mb of": {"bucket_mb": 0.02},
        "op, ": {"op": hvd.Sum},
        "backward_passes_per_step, ": {"backward_passes_per_step": 2},
        "gradient_predivide_factor, ": {"gradient_predivide_factor": 2.0},
        "compression or ": {"compression": hvd.Compression.fp16},
        "shard_group differs between the ranks": {"shard_group": 1},
    }.items():
        with refused(ValueError, what):
            build(**(arguments if hvd.rank() else {}))
    model, plain = plain_after(0, lr=SETTINGS["lr"] + 0.01 * hvd.rank())
    with refused(ValueError, f"settings of its groups (lr, ...) of rank {last_ranks()} differ from rank 0's"):
        ShardedOptimizer(plain, model.named_parameters())
    # The classic mistakes: rank 0 alone loads a file before wrapping, or a rank has another one.
    for updates in (0 if hvd.rank() else 2, 1 if hvd.rank() else 2):
        model, plain = plain_after(updates, preconditioner="adam")
        with refused(
            ValueError, f"after it by load_state_dict()) of rank {last_ranks()} differ from rank 0's"
        ):
            ShardedOptimizer(plain, model.named_parameters())
    model, plain = plain_after(1, state_dtype=torch.bfloat16 if hvd.rank() else None)
    with refused(ValueError, "optimizer state"):
        ShardedOptimizer(plain, model.named_parameters())
    build(toy.build_model())[1].close()  # the ranks still agree


# State


def check_trained_optimizer_keeps_its_state() -> None:
    model, plain = plain_after(2, preconditioner="adam")
    optimizer = ShardedOptimizer(plain, model.named_parameters(), bucket_mb=0.01)
    with refused(KeyError, "state_dict() gathers it"):
        _ = plain.state[model[0].weight]
    update(model, optimizer, 2)
    expected, reference = plain_after(3, preconditioner="adam")
    assert_equal(model, expected)
    state = optimizer.state_dict()
    if hvd.rank() == 0:
        assert [entry["step"] for entry in state["state"].values()] == [3] * 6
    with refused(ValueError, "it is not the state of this model"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0]}]})
    optimizer.load_state_dict(reference.state_dict() if hvd.rank() == 0 else None)
    update(model, optimizer, 3)
    assert_equal(model, plain_after(4, preconditioner="adam")[0])
    optimizer.load_state_dict(optimizer.state_dict())
    update(model, optimizer, 4)
    assert_equal(model, plain_after(5, preconditioner="adam")[0])
    if hvd.size() > 1:
        different = reference.state_dict()
        different["param_groups"][0]["lr"] = 0.1 + hvd.rank()
        with refused(ValueError, "given different states"):
            optimizer.load_state_dict(different)
        with refused(ValueError, "rank 0 was given no whole state"):
            optimizer.load_state_dict(None)
    optimizer.close()


def check_state_loads_into_a_plain_optimizer_and_back() -> None:
    model, optimizer = build()
    for number in range(2):
        update(model, optimizer, number)
    state = optimizer.state_dict()
    optimizer.close()
    alone = toy.build_model()
    alone.load_state_dict(model.state_dict())
    plain = ARSG(alone.parameters(), **SETTINGS)
    if hvd.rank() == 0:
        plain.load_state_dict(state)
        update(alone, plain, 2)
        assert_equal(alone, plain_after(3)[0])
    hvd.broadcast_parameters(alone.state_dict(), root_rank=0)
    model, optimizer = build(alone)
    optimizer.load_state_dict(plain.state_dict() if hvd.rank() == 0 else None)
    update(model, optimizer, 3)
    assert_equal(model, plain_after(4)[0])
    optimizer.close()


def check_state_travels_one_bucket_at_a_time() -> None:
    """What rank 0 receives, or sends, is at most a bucket, and gone before the next; others get nothing whole."""
    model, optimizer = build()
    update(model, optimizer)
    buckets = [bucket for partition in optimizer._partitions for bucket in partition.layout.buckets]
    assert len(buckets) > 2
    seen: list[StorageWeakRef] = []

    def held_by_horovod_no_more() -> None:
        # Its thread reports the end of an operation shortly before it lets go of the tensors.
        hvd.allreduce(torch.zeros(1), name="the operation before is over")

    def watch(tensor: Tensor | None) -> None:
        assert (tensor is not None) == (hvd.rank() == 0)
        held_by_horovod_no_more()
        assert all(storage.expired() for storage in seen), "the bucket before is still held"
        if tensor is not None:
            assert tensor.numel() <= max(bucket.numel for bucket in buckets)
            seen.append(StorageWeakRef(tensor.untyped_storage()))

    gather, scatter = Group.gather_to_first, Group.scatter_from_first

    def watched_gather(self: Group, shard: Tensor, what: str) -> Tensor | None:
        held_by_horovod_no_more()
        assert all(storage.expired() for storage in seen), "the bucket before is held while the next arrives"
        received = gather(self, shard, what)
        watch(received)
        return received

    def watched_scatter(self: Group, flat: Tensor | None, numel: int, *rest: Any) -> Tensor:
        watch(flat)
        return scatter(self, flat, numel, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "gather_to_first", watched_gather)
        patch.setattr(Group, "scatter_from_first", watched_scatter)
        state = optimizer.state_dict()
        entries = 3  # exp_avg, exp_avg_sq, max_exp_avg_sq
        assert len(seen) == (entries * len(buckets) if hvd.rank() == 0 else 0)
        assert hvd.rank() == 0 or state["state"] == {}
        seen.clear()
        optimizer.load_state_dict(state)
        assert len(seen) == (entries * len(buckets) if hvd.rank() == 0 and hvd.size() > 1 else 0)
    optimizer.close()


def check_bf16_state() -> None:
    """Moments in bfloat16 (with their step count) survive the way through rank 0, and masters do."""
    model = toy.build_model().bfloat16()
    plain = ARSG(model.parameters(), **SETTINGS, state_dtype="bfloat16")
    optimizer = ShardedOptimizer(plain, model.named_parameters(), bucket_mb=0.01)
    for number in range(2):
        update(model, optimizer, number)
    state = optimizer.state_dict()
    again = ShardedOptimizer(
        ARSG(copied := list(copy.deepcopy(model).parameters()), **SETTINGS, state_dtype="bfloat16"),
        [(name, p) for (name, _), p in zip(model.named_parameters(), copied, strict=True)],
        bucket_mb=0.01,
    )
    again.load_state_dict(state)
    other = again.state_dict()
    if hvd.rank() == 0:
        assert state["master_params"].keys() == set(range(6))
        for place, entry in state["state"].items():
            assert entry["step"] == other["state"][place]["step"] == 2
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                assert entry[name].dtype == torch.bfloat16
                assert torch.equal(entry[name], other["state"][place][name])
            assert torch.equal(state["master_params"][place], other["master_params"][place])
            assert not torch.equal(
                state["master_params"][place], state["master_params"][place].bfloat16().float()
            )
    optimizer.close()
    again.close()


def check_state_is_collective() -> None:
    if hvd.size() == 1:
        return
    model, optimizer = build()
    update(model, optimizer)
    before, group.MEETING_TIMEOUT = group.MEETING_TIMEOUT, 1.0
    try:
        if hvd.rank() == 0:
            with refused(RuntimeError, "outside 'if hvd.rank() == 0'"):
                optimizer.state_dict()
    finally:
        group.MEETING_TIMEOUT = before
    hvd.allgather_object(None, name="rank 0 has given up")
    if hvd.rank():
        optimizer._groups.world.meet("state_dict()")  # what rank 0 still waits for
    hvd.allgather_object(None, name="all have come")
    with refused(RuntimeError, "leave it out"):
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer.close()


# Groups, hooks, schedulers


def check_groups_can_be_added() -> None:
    def train(sharded: bool) -> nn.Module:
        model = toy.build_model()
        optimizer: torch.optim.Optimizer = ARSG(model[:3].parameters(), **SETTINGS)
        if sharded:
            names = [(n, p) for n, p in model.named_parameters() if not n.startswith("4")]
            optimizer = ShardedOptimizer(optimizer, names, bucket_mb=0.01)
        update(model, optimizer)
        optimizer.zero_grad()
        model.zero_grad()
        optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
        for number in (1, 2):
            update(model, optimizer, number)
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
        optimizer: torch.optim.Optimizer = ARSG(model[:3].parameters(), **SETTINGS)
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
                loss = toy.loss_of(model(inputs), targets)
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
    optimizer = ShardedOptimizer(ARSG(model[:3].parameters(), **SETTINGS), names, bucket_mb=0.01)

    def refuses(kinds: Any, text: str, group: Any) -> None:
        with refused(kinds, text):
            optimizer.add_param_group({"params": group})
        assert len(optimizer.param_groups) == len(optimizer._trained) == len(optimizer._partitions) == 1

    late = list(model[4].parameters())
    if hvd.size() > 1:
        lost = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
        refuses((ValueError, JobError), "can be sharded", [lost] if hvd.rank() else late)
        refuses(ValueError, "differ from rank 0's", late[::-1] if hvd.rank() else late)
    OneWrongNumber.count, right = 0, optimizer._exchange.reduce_scatter.exchange
    optimizer._exchange.reduce_scatter.exchange = OneWrongNumber(right.group)
    refuses(RuntimeError, f"1 wrong numbers on rank {hvd.size() - 1}", late)
    optimizer._exchange.reduce_scatter.exchange = right
    update(model, optimizer)
    optimizer.zero_grad()
    model.zero_grad()
    optimizer.add_param_group({"params": late})
    optimizer.add_param_group({"params": list(frozen.parameters())})  # as torch and Horovod take it
    # A checkpoint knows them by the names that every engine gives them.
    assert [spec.name for spec in optimizer.specs] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in optimizer._frozen] == ["frozen.weight", "frozen.bias"]
    update(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.close()
    expected = toy.build_model()
    plain = ARSG(expected[:3].parameters(), **SETTINGS)
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
    assert [spec.name for spec in optimizer.specs] == names
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
    plain = ARSG(model.parameters(), **SETTINGS)
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
    assert optimizer.param_groups[0]["lr"] == SETTINGS["lr"] / 2
    with refused(TypeError, "cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    optimizer.close()


def check_two_optimizers_at_once() -> None:
    """As of a GAN: each updates its own half of what one backward pass computes."""
    model = toy.build_model()
    halves = [
        ShardedOptimizer(ARSG(half.parameters(), **SETTINGS), half.named_parameters(), bucket_mb=0.01)
        for half in (model[:2], model[2:])
    ]
    for number in range(3):
        inputs, targets = toy.batch(number)
        for optimizer in halves:
            optimizer.zero_grad()
        toy.loss_of(model(inputs), targets).backward()
        for optimizer in halves if number % 2 else halves[::-1]:
            optimizer.step()
    assert_equal(model, plain_after(3)[0])
    for optimizer in halves:
        optimizer.close()


# Refusals at construction


def check_refusals() -> None:
    model = toy.build_model()
    named = list(model.named_parameters())

    def make(optimizer: Any = None, names: Any = None, **arguments: Any) -> None:
        ShardedOptimizer(optimizer or ARSG(model.parameters()), names or named, **arguments)

    with refused(TypeError, "element_wise=True"):
        make(torch.optim.Adafactor(model.parameters()))
    with refused(TypeError, "element_wise=True"):
        make(torch.optim.LBFGS(model.parameters()))
    with refused(TypeError, "must be a torch.optim.Optimizer"):
        make(model)
    with refused(TypeError, "already distributed"):
        make(hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named))
    for text, arguments in {
        "backward_passes_per_step": {"backward_passes_per_step": 0},
        "Adasum": {"op": hvd.Adasum},
        "gradient_predivide_factor needs": {"gradient_predivide_factor": 2.0, "op": hvd.Sum},
        "groups and num_groups": {"groups": 2},
        "gather must be": {"gather": "later"},
        "reduce_scatter='ring'": {"reduce_scatter": "ring"},
        "shard_group must be": {"shard_group": "rack"},
    }.items():
        with refused(ValueError, text):
            make(**arguments)
    with refused(ValueError, "found twice: 0.weight"):
        make(names=[*named, named[0]])
    with refused(ValueError, "no name for 1"):
        make(names=named[1:])
    complex_model = nn.Linear(2, 2, dtype=torch.complex64)
    with refused(ValueError, "can be sharded"):
        ShardedOptimizer(ARSG(complex_model.parameters()), complex_model.named_parameters())
    factored = torch.optim.SGD(model.parameters(), lr=0.1)
    factored.state[model[0].weight]["row"] = torch.zeros(101)
    with refused(ValueError, "state 'row' of 0.weight has shape (101,)"):
        make(factored)
    if hvd.gloo_enabled():
        with refused(ValueError, "refused over Gloo"):
            make(reduce_scatter="reducescatter")
    _, optimizer = build(model)
    with refused(ValueError, "call its close() first"):
        build(model)
    optimizer.close()
    with refused(TypeError, "SGD has no base_iterate()"):
        sgd = ShardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), named)
        with sgd.base_iterate():
            pass
    sgd.close()


class MixedUp(AllToAllReduceScatter):
    """A reduce-scatter that takes one of two buckets under way for the other, on the last rank."""

    def start(self, wire: Tensor, decode: Any, name: str, pool: BufferPool) -> exchange.Started:
        if self.group.rank == self.group.size - 1:
            name = {"test0": "test1", "test1": "test0"}.get(name, name)
        return super().start(wire, decode, name, pool)


def check_join_is_refused() -> None:
    """With plain Horovod the rank that has joined dies of a segmentation fault at the next update of the others."""
    model, optimizer = build()
    with refused(RuntimeError, "give every rank as many batches"):
        hvd.join()
    update(model, optimizer)
    optimizer.close()
    assert hvd.join() in range(hvd.size())


class OneWrongNumber(AllToAllReduceScatter):
    """A reduce-scatter that is wrong in one element, on the last rank, in one exchange of many."""

    count = 0

    def start(self, wire: Tensor, decode: Any, name: str, pool: BufferPool) -> exchange.Started:
        started = super().start(wire, decode, name, pool)
        OneWrongNumber.count += 1
        if OneWrongNumber.count == 4 and self.group.rank == self.group.size - 1:
            right = started.result

            def wrong(received: Any) -> Tensor:
                total = right(received)
                total[5] += 1
                return total

            started.result = wrong
        return started


def check_construction_tests_the_exchange_it_will_use() -> None:
    model = toy.build_model()
    OneWrongNumber.count = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "choose_reduce_scatter", lambda path, group, device: OneWrongNumber(group))
        with refused(RuntimeError, f"1 wrong numbers on rank {hvd.size() - 1}"):
            build(model)
    build(model)[1].close()


def check_self_test_finds_one_wrong_number() -> None:
    sizes = [(16 * 3 * hvd.size(), dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)]
    group = Group()
    self_test.check_exchanges(group, AllToAllReduceScatter(group), sizes)
    OneWrongNumber.count = 0
    with refused(RuntimeError, f"1 wrong numbers on rank {hvd.size() - 1}"):
        self_test.check_exchanges(group, OneWrongNumber(group), sizes)
    if hvd.size() > 1:
        with refused(RuntimeError, "wrong numbers on rank 0"):
            self_test.check_exchanges(group, MixedUp(group), sizes)
    assert isinstance(choose_reduce_scatter("auto", group, "cpu"), AllToAllReduceScatter)
    if not hvd.gloo_enabled():
        native = choose_reduce_scatter("reducescatter", group, "cpu")
        self_test.check_exchanges(group, native, sizes)
        model, optimizer = build(reduce_scatter="reducescatter")
        update(model, optimizer)
        assert_equal(model, plain_after(1)[0])
        optimizer.close()


def check_a_rank_that_leaves_lets_the_others_have_the_parameters() -> None:
    """Rank 0 updates last, when one of the others has ended its program and the rest have shut Horovod down."""
    torch._dynamo.utils.counters.clear()  # or else step() waits
    signs = Path(hvd.broadcast_object(tempfile.mkdtemp(), root_rank=0))
    model, optimizer = build()
    update(model, optimizer)  # the first one is collective
    optimizer.zero_grad()
    inputs, targets = toy.batch(1)
    toy.loss_of(model(inputs), targets).backward()
    if hvd.rank() == 0:
        others = hvd.size() - 1

        def wait_for_signs() -> None:
            while len(list(signs.iterdir())) < others:
                pass

        hold_back_update(optimizer, wait_for_signs)
    optimizer.step()
    if hvd.rank():
        sign_when_waiting_or_gone(signs / str(hvd.rank()))
        del optimizer, model
        if hvd.rank() == hvd.size() - 1:
            sys.exit()
    hvd.shutdown()
    if "model" in locals():
        assert_equal(model, plain_after(2)[0])


def sign_when_waiting_or_gone(path: Path) -> None:
    """Touches a file once this rank waits for others, or has left them without."""
    horovod, sleep = mpi_ops._basics.MPI_LIB_CTYPES, time.sleep
    leave = horovod.horovod_shutdown

    def signing_sleep(seconds: float) -> None:
        path.touch()
        sleep(seconds)

    def signing_leave() -> None:
        leave()
        path.touch()

    time.sleep, horovod.horovod_shutdown = signing_sleep, signing_leave


CHECKS = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}
# It uses torch.compile, after which every step() waits, and the other checks would show less.
CHECKS["readers_wait"] = CHECKS.pop("readers_wait")
# After it there is no Horovod.
CHECKS["a_rank_that_leaves_lets_the_others_have_the_parameters"] = CHECKS.pop(
    "a_rank_that_leaves_lets_the_others_have_the_parameters"
)


def main() -> None:
    hvd.init()
    torch.set_num_threads(1)
    run_checks({name: CHECKS[name] for name in sys.argv[1:]} or CHECKS)
    if hvd.is_initialized():
        hvd.barrier()
        hvd.shutdown()
    end_process(0)


if __name__ == "__main__":
    main()
