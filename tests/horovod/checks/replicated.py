"""Properties of the wrapped optimizer that are no training, checked on real ranks."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import nn

from arsg_dist import ARSG
from arsg_dist.horovod import DistributedOptimizer, broadcast
from arsg_dist.horovod.comm.communicator import HorovodCommunicator
from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.messages import check_messages


def raises(kind: Any, text: str, action: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        action()


def small(**settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, wrapped(ARSG(model.parameters(), lr=0.1, eps=1e-3, **settings), model)


def wrapped(optimizer: Any, model: nn.Module, **settings: Any) -> Any:
    return DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **settings)


def backward(model: nn.Module) -> None:
    model(torch.full((1, 3), 1.0 + hvd.rank()).to(next(model.parameters()).dtype)).sum().backward()


def check_step_hooks_fire_once_and_see_the_average() -> None:
    def fired(wrap: Callable[..., Any]) -> tuple[int, int, float]:
        model = nn.Linear(3, 2)
        optimizer = wrap(ARSG(model.parameters()), named_parameters=model.named_parameters())
        optimizer.load_state_dict(optimizer.state_dict())  # after which torch wraps the class's step
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append(model.weight.grad[0, 0].item()))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        backward(model)
        optimizer.step()
        return calls.count("after"), len(calls), calls[-2] if len(calls) == 2 else 0.0

    assert fired(DistributedOptimizer) == (1, 2, (1 + hvd.size()) / 2)
    assert fired(hvd.DistributedOptimizer)[0] == 2, (
        "plain Horovod calls hooks once: this repair has no purpose"
    )


def check_bf16_gradients_are_averaged_in_fp32() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = wrapped(ARSG(model.parameters()), model)
    # 1 + 2^-8 is no bfloat16; the mean of 1 and 1 + 2^-7 summed in bfloat16 would be lost in 2 + 2^-7.
    values = [1.0, 1 + 2**-7, 1 + 2**-6]
    model(torch.tensor([[values[hvd.rank()]]]).bfloat16()).sum().backward()
    optimizer.synchronize()
    mean = torch.tensor(values[: hvd.size()]).mean().bfloat16()
    assert model.weight.grad.dtype == torch.bfloat16
    assert model.weight.grad.item() == mean.item(), (model.weight.grad.item(), mean.item())


def _replaced(p: Any) -> None:
    p.grad = p.grad * 0.1


def _removed(p: Any) -> None:
    p.grad = None


CHANGES: dict[str, Callable[[Any], object]] = {
    "clipped": lambda p: torch.nn.utils.clip_grad_norm_(p, 0.1),
    "in place": lambda p: p.grad.mul_(0.1),
    "zeroed": lambda p: p.grad.zero_(),
    "replaced": _replaced,
    "removed": _removed,
    ".data": lambda p: p.grad.data.mul_(0.1),
    ".data, new": lambda p: setattr(p.grad, "data", p.grad.data * 0.1),
    "set_": lambda p: p.grad.set_(p.grad * 0.1),
    "numpy": lambda p: p.grad.numpy().fill(0.5),
}
SENT = {
    "none": {},
    "fp16": {"compression": hvd.Compression.fp16},
    "one group": {"groups": 1},
    "groups, fp16": {"groups": 2, "compression": hvd.Compression.fp16},
    "predivided": {"gradient_predivide_factor": 2.0},
}


def check_changing_gradients_in_flight_is_refused() -> None:
    """Whichever way, however they are sent: each change with each compression and grouping, on one rank and on all. And
    nothing is in flight afterwards: the gradients are the averages of those that backward() left."""
    average = torch.full((2, 3), (1 + hvd.size()) / 2)
    for sent, settings in SENT.items():
        for way, change in CHANGES.items():
            model = nn.Linear(3, 2)
            optimizer = wrapped(ARSG(model.parameters()), model, **settings)
            backward(model)
            for parameter in (model.weight, model.bias):
                change(parameter)
            raises(RuntimeError, "between backward() and", optimizer.step)
            assert torch.equal(model.bias.grad, torch.ones(2)) or way not in ("replaced", "removed"), (
                sent,
                way,
            )
            assert not optimizer._exchange.in_flight, (sent, way)
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            assert torch.equal(model.weight.grad, average), (sent, way)


def check_gradients_may_be_changed_before_they_are_sent() -> None:
    """As with Horovod's: after all but the last of several backward passes this rank's sum is its own, and counts."""
    for way, change in CHANGES.items():
        if way in ("removed", "clipped"):
            continue
        model = nn.Linear(3, 2)
        optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=0.0), model, backward_passes_per_step=2)
        backward(model)
        change(model.weight)
        first = model.weight.grad.clone()
        backward(model)
        optimizer.step()
        mean = hvd.allreduce(first, name="first passes") + (1 + hvd.size()) / 2
        assert torch.allclose(model.weight.grad, mean), way


def check_unscaling_gradients_in_flight_is_refused() -> None:
    model, optimizer = small()
    scaler = torch.amp.GradScaler("cpu")
    loss = model(torch.ones(1, 3)).sum()
    scaler.scale(loss).backward()
    raises(RuntimeError, "synchronize() before", lambda: scaler.step(optimizer))
    optimizer.synchronize()
    scaler.step(optimizer)


def check_out_of_order_calls_are_refused() -> None:
    model, optimizer = small()
    backward(model)
    raises(RuntimeError, "in flight", optimizer.zero_grad)
    with optimizer.skip_synchronize():
        raises(RuntimeError, "call synchronize() before", optimizer.step)
    optimizer.step()
    optimizer.zero_grad()
    with optimizer.base_iterate():
        raises(RuntimeError, "base_iterate", optimizer.step)


def check_bad_arguments_are_refused() -> None:
    model, optimizer = small()
    fresh = ARSG(model.parameters())
    raises(TypeError, "wrapped for Horovod already", lambda: DistributedOptimizer(optimizer))
    plain = hvd.DistributedOptimizer(ARSG(model.parameters()))
    raises(TypeError, "wrapped for Horovod already", lambda: DistributedOptimizer(plain))
    raises(TypeError, "must be a torch.optim.Optimizer", lambda: DistributedOptimizer(model))
    raises(TypeError, "(name, parameter)", lambda: DistributedOptimizer(fresh, model.parameters()))
    twice = [("a", model.weight), ("a", model.bias)]
    raises(ValueError, "must be unique", lambda: DistributedOptimizer(fresh, twice))
    raises(ValueError, "is not in named_parameters", lambda: DistributedOptimizer(fresh, twice[:1]))
    for settings, text in (
        ({"op": 17}, "op must be"),
        ({"backward_passes_per_step": 0}, "positive integer"),
        ({"compression": "fp16"}, "hvd.Compression"),
        ({"gradient_predivide_factor": 0.0}, "must be positive"),
        ({"gradient_predivide_factor": 2.0, "op": hvd.Sum}, "needs op=hvd.Average"),
        ({"groups": -1}, "non-negative"),
        ({"groups": [[model.weight], [model.weight]]}, "only appear once"),
        ({"op": hvd.Adasum, "groups": 2}, "does not take groups"),
    ):
        raises(
            (ValueError, TypeError),
            text,
            lambda settings=settings: DistributedOptimizer(fresh, model.named_parameters(), **settings),
        )


def check_a_new_optimizer_takes_over_a_model() -> None:
    """The old one's hooks, which live on in a circle when it is dropped, would send every gradient too."""
    model, old = small()
    for in_flight in (False, True):
        backward(model)
        if not in_flight:
            old.step()
            old.zero_grad()
    new = wrapped(torch.optim.SGD(model.parameters(), lr=1.0), model, op=hvd.Sum)
    assert torch.equal(model.weight.grad, torch.full((2, 3), (1 + hvd.size()) / 2))
    for _ in range(2):
        new.zero_grad()
        backward(model)
        new.step()
        assert torch.equal(model.bias.grad, torch.full((2,), float(hvd.size())))
    old.zero_grad()
    raises(RuntimeError, "which has ended", old.step)


def check_a_group_added_later_has_the_number_of_passes_of_now() -> None:
    """Not the one at wrapping, by which its gradients would be sent after the first of two passes."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.eye_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    optimizer = DistributedOptimizer(
        torch.optim.SGD(model[0].parameters(), lr=0.0), named_parameters=model.named_parameters()
    )
    optimizer.set_backward_passes_per_step(2)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    backward(model)
    backward(model)
    optimizer.step()
    assert torch.equal(model[1].weight.grad, torch.full((2, 3), 1.0 + hvd.size()))
    assert torch.equal(model[1].bias.grad, torch.full((2,), 2.0))


def check_sparse_gradients_are_those_of_one_process() -> None:
    """For optimizers that take them; also of a rank that did not look anything up."""
    rows = [[0, 1, 1], [1, 4, 5], [2, 2, 3]]
    for make, settings, dtype in (
        (lambda p: torch.optim.SGD(p, lr=0.1), {}, torch.float32),
        (lambda p: torch.optim.SGD(p, lr=0.1), {"compression": hvd.Compression.fp16}, torch.float32),
        (lambda p: torch.optim.SGD(p, lr=0.1), {"op": hvd.Sum}, torch.bfloat16),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), {}, torch.float32),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), {"sparse_as_dense": True}, torch.float32),
        (lambda p: torch.optim.SparseAdam(list(p), lr=0.1), {}, torch.float32),
        (lambda p: torch.optim.SparseAdam(list(p), lr=0.1), {"sparse_as_dense": True}, torch.float32),
    ):
        torch.manual_seed(0)
        table = nn.Embedding(6, 2, sparse=True).to(dtype)
        alone = copy.deepcopy(table)
        optimizer, plain = wrapped(make(table.parameters()), table, **settings), make(alone.parameters())
        for update in range(2):
            optimizer.zero_grad()
            plain.zero_grad()
            looking = range(hvd.size() - update)
            if hvd.rank() in looking:
                table(torch.tensor(rows[hvd.rank()])).square().sum().backward()
            optimizer.step()
            share = 1 if settings.get("op") == hvd.Sum else hvd.size()
            sum(alone(torch.tensor(rows[rank])).square().sum() / share for rank in looking).backward()
            plain.step()
        precision = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(table.weight, alone.weight, rtol=precision, atol=precision)
    optimizer.zero_grad()
    table(torch.tensor(rows[hvd.rank()])).square().sum().backward()
    table.weight.grad = table.weight.grad * 0.1
    raises(RuntimeError, "the gradient of weight was changed", optimizer.step)


def check_a_rank_without_rows_in_the_first_update_takes_part() -> None:
    """Where plain Horovod waits for ever: nothing tells this rank that the others' gradients are sparse."""
    for layers in (1, 2):
        torch.manual_seed(0)
        model = nn.ModuleDict({f"table{n}": nn.Embedding(6, 2, sparse=True) for n in range(layers)})
        model["dense"] = nn.Linear(2, 1, bias=False)
        alone = copy.deepcopy(model)
        optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=0.1), model)
        plain = torch.optim.SGD(alone.parameters(), lr=0.1)

        def loss(model: Any, rank: int, update: int, layers: int = layers) -> torch.Tensor:
            if rank == 0 and update == 0:
                return model["dense"](torch.ones(1, 2)).sum()
            looked_up = [
                model[f"table{n}"](torch.tensor([rank, 4])) for n in range(1 + update * (layers - 1))
            ]
            return sum(model["dense"](found).square().sum() for found in looked_up)

        for update in range(2):
            optimizer.zero_grad()
            plain.zero_grad()
            loss(model, hvd.rank(), update).backward()
            optimizer.step()
            sum(loss(alone, rank, update) / hvd.size() for rank in range(hvd.size())).backward()
            plain.step()
        for name, parameter in alone.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), parameter, msg=name)


def check_every_optimizer_of_torch_equals_one_process() -> None:
    """Those that plain Horovod serves, with plain Horovod's values."""
    one_step = {"SparseAdam", "LBFGS"}  # with sparse gradients, and with a closure: elsewhere
    for name, kind in sorted(vars(torch.optim).items()):
        if not isinstance(kind, type) or kind is torch.optim.Optimizer or name in one_step:
            continue
        if not issubclass(kind, torch.optim.Optimizer):
            continue
        torch.manual_seed(0)
        models = [
            nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
            for _ in range(3)
        ]
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())
        settings = {"momentum": 0.9} if name == "SGD" else {}
        ours, theirs, plain = (kind(model.parameters(), lr=0.05, **settings) for model in models)
        ours = wrapped(ours, models[0])
        theirs = hvd.DistributedOptimizer(
            theirs, [(f"theirs.{name}.{n}", p) for n, p in models[1].named_parameters()]
        )
        for update in range(3):
            inputs = [
                torch.sin(torch.arange(6.0).view(2, 3) + rank + 3 * update) for rank in range(hvd.size())
            ]
            for optimizer, model in ((ours, models[0]), (theirs, models[1])):
                optimizer.zero_grad()
                model(inputs[hvd.rank()]).square().mean().backward()
                optimizer.step()
            plain.zero_grad()
            models[2](torch.cat(inputs)).square().mean().backward()
            plain.step()
        for mine, horovods, right in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(mine, horovods), name
            torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-5, msg=name)


def check_lbfgs_decides_by_the_loss_of_all_ranks() -> None:
    """By its own each rank would search another way along its line, and ask the others for gradients in vain."""
    inputs = torch.sin(torch.arange(36.0)).view(-1, 3)[: 4 * hvd.size()]
    for search in (None, "strong_wolfe"):
        for op in (hvd.Average, hvd.Sum):
            models = [nn.Linear(3, 1), nn.Linear(3, 1)]
            models[1].load_state_dict(models[0].state_dict())
            hvd.broadcast_parameters(models[1].state_dict())
            models[0].load_state_dict(models[1].state_dict())
            ours, plain = (
                torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6, line_search_fn=search)
                for model in models
            )
            ours = wrapped(ours, models[0], op=op)

            def closure(
                model: Any, optimizer: Any, rows: torch.Tensor, share: float
            ) -> Callable[[], torch.Tensor]:
                def evaluate() -> torch.Tensor:
                    optimizer.zero_grad()
                    loss = ((model(rows) - rows.sum(1, keepdim=True)).square() - 0.1).mean() * share
                    loss.backward()
                    return loss

                return evaluate

            mine = inputs.view(hvd.size(), -1, 3)[hvd.rank()]
            for _ in range(2):
                loss = ours.step(closure(models[0], ours, mine, 1.0 if op == hvd.Average else 1 / hvd.size()))
                right = plain.step(closure(models[1], plain, inputs, 1.0))
                torch.testing.assert_close(loss.float(), right.float(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-3, atol=1e-4)
    adasum = torch.optim.LBFGS(models[0].parameters())
    if hvd.mpi_enabled() and hvd.size() == 2:
        raises(ValueError, "does not go with LBFGS", lambda: DistributedOptimizer(adasum, op=hvd.Adasum))


def check_settings_that_differ_are_refused_before_the_update() -> None:
    """A schedule fed with each rank's own loss would let the replicas drift apart without a word."""
    model = nn.Linear(3, 2)
    optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=0.5), model)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for update in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        plateau.step(1.0 if hvd.rank() == 1 else 1.0 - 0.1 * update)
    backward(model)
    before = model.weight.detach().clone()
    text = "lr of group 0 is 0.5 on rank 0, 0.05 on rank 1. A schedule"
    raises(RuntimeError, text, optimizer.step)
    assert torch.equal(model.weight, before)
    optimizer.param_groups[0]["lr"] = 0.5 * (1 + 1e-15 * hvd.rank())  # as of two C libraries
    optimizer.step()
    assert torch.allclose(model.weight, before - 0.5 * (1 + hvd.size()) / 2)


def check_what_users_find_on_horovods_is_here() -> None:
    """The names of parameters; and a schedule made before wrapping does not complain of its order."""
    model = nn.Linear(3, 2)
    plain = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(plain, 1, gamma=0.5)
    optimizer = wrapped(plain, model)
    assert optimizer._parameter_names == {model.weight: "weight", model.bias: "bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            backward(model)
            optimizer.step()
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.125


def check_sparse_gradients_are_refused_where_they_arise() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    wrapped(ARSG(table.parameters()), table)
    raises(RuntimeError, "sparse_as_dense=True", table(torch.tensor([1])).sum().backward)


def check_the_wrapped_optimizer_shares_groups_and_state() -> None:
    model, _ = small()
    optimizer = ARSG(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    distributed = wrapped(optimizer, model)
    assert isinstance(distributed, ARSG)
    assert repr(distributed) == repr(optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    assert distributed.param_groups[0]["lr"] == 0.5
    assert distributed.state[model.weight]["max_exp_avg_sq"].any()


def check_rank_0_state_reaches_every_rank() -> None:
    """Rank 0 is trained, with a bf16 state; the others are fresh, or have been trained otherwise."""
    for wrap in (lambda optimizer, model: optimizer, wrapped):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = ARSG(model.parameters(), lr=0.1, state_dtype="bfloat16", weight_decay=0.1)
        for _ in range(3 if hvd.rank() == 0 else hvd.rank() - 1):
            model(torch.full((1, 3), 1.0 + hvd.rank())).sum().backward()
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + hvd.rank())
        optimizer = wrap(optimizer, model)
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        states = hvd.allgather_object((model.state_dict(), optimizer.state_dict()))
        assert states[0][1]["state"][0]["step"] == 3
        assert states[0][1]["state"][0]["max_exp_avg_sq"].dtype == torch.bfloat16
        assert states[0][1]["state"][0]["max_exp_avg_sq"].any()
        for weights, state in states[1:]:
            assert torch.equal(weights["weight"], states[0][0]["weight"])
            assert state["param_groups"] == states[0][1]["param_groups"]
            for index in (0, 1):
                for name, value in states[0][1]["state"][index].items():
                    assert torch.equal(
                        torch.as_tensor(state["state"][index][name]), torch.as_tensor(value)
                    ), name


def check_broadcasting_no_state_makes_no_step() -> None:
    def moved(broadcast_state: Callable[..., None], wrap: Callable[..., Any]) -> float:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = ARSG(model.parameters(), lr=0.1, weight_decay=0.1)
        if wrap is wrapped and hvd.rank():
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()  # state that rank 0 does not have
        before = model.weight.detach().clone()
        optimizer = wrap(optimizer, model)
        broadcast_state(optimizer, root_rank=0)
        assert broadcast_state is broadcast._horovod_state or not optimizer.state
        return (model.weight - before).abs().max().item()

    assert moved(hvd.broadcast_optimizer_state, wrapped) == 0
    assert moved(hvd.broadcast_optimizer_state, lambda optimizer, _: optimizer) == 0
    plain = moved(broadcast._horovod_state, lambda optimizer, _: optimizer)
    assert plain > 0, "plain Horovod makes no step: this repair has no purpose"


def check_broadcasts_copy_every_dtype_and_layout() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool, torch.int64):
        tensors = {
            "flat": torch.arange(7).to(dtype) if hvd.rank() == 0 else torch.zeros(7, dtype=dtype),
            "scalar": torch.tensor(3 - 3 * bool(hvd.rank())).to(dtype),
            "empty": torch.zeros(0, dtype=dtype),
            "strided": torch.full((4, 5), 1 - bool(hvd.rank())).to(dtype).t(),
        }
        hvd.broadcast_parameters(tensors, root_rank=0)
        assert torch.equal(tensors["flat"], torch.arange(7).to(dtype)), dtype
        assert torch.equal(tensors["scalar"], torch.tensor(3).to(dtype)), dtype
        assert torch.equal(tensors["strided"], torch.ones(5, 4).to(dtype)), dtype
    raises(ValueError, "hvd.broadcast_object", lambda: hvd.broadcast_parameters({"extra": 3}))


def check_different_optimizers_are_refused_on_every_rank() -> None:
    model = nn.Linear(3, 2 + hvd.rank())
    raises(
        ValueError,
        "different parameter groups",
        lambda: hvd.broadcast_optimizer_state(ARSG(model.parameters())),
    )


def check_a_rank_that_has_joined_takes_part_with_zeros() -> None:
    """As under plain Horovod; the other ranks' gradients are still divided by the number of all."""
    model = nn.Linear(3, 2, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = wrapped(torch.optim.SGD(model.parameters(), lr=1.0), model)
    for _ in range(1 if hvd.rank() else 2):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    last = hvd.join()
    moved = -sum(range(1, hvd.size() + 1)) / hvd.size() - (0 if hvd.rank() else 1 / hvd.size())
    assert torch.allclose(model.weight.detach(), torch.full((2, 3), moved))
    assert last == 0 or hvd.size() == 1


def check_adasum_combines_the_updates() -> None:
    """Two ranks: a + b with each scaled by 1 − a·b/(2|·|²); needs MPI and a power of two of ranks."""
    model = toy.build_model()
    fresh = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    if hvd.gloo_enabled():
        raises(ValueError, "mpirun", lambda: wrapped(fresh, model, op=hvd.Adasum))
        return
    if hvd.size() == 3:
        raises(ValueError, "power of two", lambda: wrapped(fresh, model, op=hvd.Adasum))
        return
    local = toy.build_model()
    before = [p.detach().clone() for p in model.parameters()]
    updates = []
    for network, optimizer in ((model, wrapped(fresh, model, op=hvd.Adasum)), (local, None)):
        optimizer = optimizer or ARSG(network.parameters(), **toy.HYPERPARAMETERS)
        inputs, targets = (t[hvd.rank() :: hvd.size()] for t in toy.batch(0))
        fired: list[int] = []
        optimizer.register_step_post_hook(lambda *_, fired=fired: fired.append(1))
        toy.loss_of(network(inputs), targets).backward()
        optimizer.step()
        assert fired == [1]
        updates.append([p.detach() - b for p, b in zip(network.parameters(), before, strict=True)])
    combined, own = updates
    of_ranks = hvd.allgather_object(own, name="own_updates")
    for index, update in enumerate(combined):
        a = of_ranks[0][index]
        expected = a
        if hvd.size() == 2:
            b = of_ranks[1][index]
            dot = (a * b).sum()
            expected = a * (1 - dot / (2 * a.pow(2).sum())) + b * (1 - dot / (2 * b.pow(2).sum()))
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-6)


def check_adasum_has_horovods_values() -> None:
    """With a state that goes on, several passes before an update, an early step, and fp16 on the way."""
    if hvd.gloo_enabled() or hvd.size() == 3:
        return
    for settings in ({}, {"backward_passes_per_step": 2}, {"compression": hvd.Compression.fp16}):
        models = [toy.build_model(7), toy.build_model(7)]
        ours, horovods = (
            wrap(
                torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
                [(f"{form}.{name}", p) for name, p in model.named_parameters()],
                op=hvd.Adasum,
                **settings,
            )
            for (form, wrap), model in zip(
                (("ours", DistributedOptimizer), ("theirs", hvd.DistributedOptimizer)), models, strict=True
            )
        )
        for update in range(3):
            for optimizer, model in ((ours, models[0]), (horovods, models[1])):
                optimizer.zero_grad()
                for number in range(1 if update == 1 else settings.get("backward_passes_per_step", 1)):
                    inputs, targets = (t[hvd.rank() :: hvd.size()] for t in toy.batch(update + 5 * number))
                    toy.loss_of(model(inputs), targets).backward()
                if optimizer is ours and update == 2:  # plain Horovod refuses this
                    optimizer.synchronize()
                    with optimizer.skip_synchronize():
                        optimizer.step()
                else:
                    optimizer.step()
        started_from = dict(toy.build_model(7).named_parameters())
        assert_same_weights(*(dict(model.named_parameters()) for model in models), started_from=started_from)


def check_a_frozen_member_of_a_group_stays() -> None:
    """Horovod sends the whole group, zeros for it; stepped with those, weight decay would move it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    trained, frozen = model[0].weight, model[1].weight
    optimizer = wrapped(
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5), model, groups=[[trained, frozen]]
    )
    frozen.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in (trained, frozen)]
    backward(model)
    optimizer.step()
    assert frozen.grad is None
    assert torch.equal(frozen, before[1])
    assert not torch.equal(trained, before[0])


def check_messages_are_plain_values_of_every_rank() -> None:
    """Also settings and state: a kind that is not sent is refused on every rank."""
    check_messages(HorovodCommunicator())
    _, optimizer = small()
    optimizer.param_groups[0]["custom"] = {1}
    raises(
        TypeError,
        "rank 0 cannot send its value: builtins.set",
        lambda: hvd.broadcast_optimizer_state(optimizer),
    )
