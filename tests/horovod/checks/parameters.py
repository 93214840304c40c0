"""Parameters that others read, who wait for those of the last update, or write."""

import copy
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.nn import functional

from arsg_dist import ARSG
from arsg_dist.horovod import ShardedOptimizer
from tests.horovod.checks.common import (
    assert_equal,
    build,
    late_exchange,
    loss_of,
    plain_after,
    refused,
    update,
)
from tests.support import toy


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
            assert lazy.shards.pending.started, (
                f"{name}: nothing to wait for, so the comparison would show nothing"
            )
            assert not eager.shards.pending.started
            stale = torch.cat([a.view(-1).clone() for p in lazy.shards.partitions for a in p.arenas])
            assert torch.equal(read(model), read(twin)), name
            lazy.synchronize_parameters()
            fresh = torch.cat([a.view(-1) for p in lazy.shards.partitions for a in p.arenas])
            # The parts a rank owns are its fp32 masters, updated in place: alone it waits for no data.
            assert hvd.size() == 1 or not torch.equal(stale, fresh), f"{name}: the update was already there"
        update(model, lazy, 9)
        assert not lazy.shards.pending.started, "not awaited under torch.compile"
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
        assert optimizer.shards.pending.lazy
        assert torch.allclose(weight.detach(), 1 - 0.1 * torch.arange(1000.0), atol=1e-4)
    optimizer.close()


def check_param_groups_wait() -> None:
    """Going through the groups waits; clearing gradients does not."""
    model, optimizer = build()
    with late_exchange():
        update(model, optimizer)
        optimizer.zero_grad()
        assert optimizer.shards.pending.started
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
        ShardedOptimizer(ARSG([p for _, p in half], **toy.HYPERPARAMETERS), half, bucket_mb=0.01)
        for half in (weights, biases)
    ]
    with late_exchange():
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(optimizer.shards.pending.started for optimizer in optimizers)
        assert_equal(model, plain_after(1)[0])
    for optimizer in optimizers:
        assert all(type(module.__dict__["_parameters"]) is not dict for module in model[::2])
        optimizer.close()
    assert all(type(module.__dict__["_parameters"]) is dict for module in model[::2])


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
        for master in (m for p in optimizer.shards.partitions for m in p.masters):
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
