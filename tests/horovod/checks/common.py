"""What the checks of a sharded optimizer are written with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arsg_dist import ARSG
from arsg_dist.horovod import ShardedOptimizer
from arsg_dist.horovod.comm.collectives import AllToAllReduceScatter, BufferPool, Started
from arsg_dist.horovod.comm.process_groups import Group
from arsg_dist.horovod.sharded import gather
from tests.support import toy


def build(model: nn.Module | None = None, **arguments: Any) -> tuple[nn.Module, ShardedOptimizer]:
    model = toy.build_model() if model is None else model
    optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    return model, ShardedOptimizer(optimizer, model.named_parameters(), **{"bucket_mb": 0.01, **arguments})


class TwoDtypes(nn.Module):
    """Has parameters in fp32 and in fp64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(17, 8), nn.Linear(8, 5).double()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs).double())
        return outputs


def loss_of(model: nn.Module, number: int = 0) -> Tensor:
    dtype = next(model.parameters()).dtype
    inputs, targets = (tensor.to(dtype) for tensor in toy.batch(number))
    return toy.loss_of(model(inputs), targets)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, *numbers: int) -> None:
    for number in numbers or [0]:
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()


@contextmanager
def refused(kinds: Any, text: str) -> Iterator[None]:
    with pytest.raises(kinds) as raised:
        yield
    assert text in str(raised.value), f"{text!r} is not in: {raised.value}"


def plain_after(updates: int, **settings: Any) -> tuple[nn.Module, ARSG]:
    model = toy.build_model()
    optimizer = ARSG(model.parameters(), **{**toy.HYPERPARAMETERS, **settings})
    for number in range(updates):
        update(model, optimizer, number)
    return model, optimizer


def assert_equal(actual: nn.Module | dict[str, Tensor], expected: nn.Module | dict[str, Tensor]) -> None:
    actual = actual if isinstance(actual, dict) else actual.state_dict()
    expected = expected if isinstance(expected, dict) else expected.state_dict()
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(actual[name], expected[name], rtol=1e-4, atol=1e-6), name


@contextmanager
def late_exchange() -> Iterator[None]:
    """All-gathers write at the last moment, so that whoever does not wait reads old values."""
    start = gather.start_all_gather

    def late(group: Group, shard: Tensor, bucket: Tensor, *rest: Any) -> Started:
        arrived = torch.empty_like(bucket)
        started = start(group, shard, arrived, *rest)
        return Started(started.handle, lambda output: bucket.copy_(started.result(output)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "start_all_gather", late)
        yield


class OneWrongNumber(AllToAllReduceScatter):
    """A reduce-scatter that is wrong in one element, on the last rank, in one exchange of many."""

    count = 0

    def start(self, wire: Tensor, decode: Any, name: str, pool: BufferPool) -> Started:
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
