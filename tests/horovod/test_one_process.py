"""What ranks do with what arrives, in this process: Horovod's part is played by the tests."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

from arsg_dist import ARSG
from arsg_dist.horovod import broadcast
from arsg_dist.horovod.comm import collectives, communicator
from arsg_dist.horovod.comm.collectives import AllToAllReduceScatter, BufferPool
from arsg_dist.horovod.comm.verification import CheckedReduceScatter
from arsg_dist.horovod.replicated.in_flight import InFlight
from arsg_dist.horovod.sharded.state_dict import _alike


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shards_in_half_precision_are_added_up_in_float32(
    ranks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a sum in half precision, whose roundings grow with the ranks, on two ranks (which swap) or on more."""
    small = 2.0**-9 if dtype == torch.bfloat16 else 2.0**-12
    buckets = [torch.full((2 * ranks,), value, dtype=dtype) for value in (1.0, small, small)[:ranks]]
    group: Any = SimpleNamespace(rank=0, size=ranks, name="group")

    def swap(group: Any, sent: Tensor, received: Tensor, name: str) -> int:
        received.copy_(buckets[1][:2])
        return -1

    def all_to_all(group: Any, sent: Tensor, splits: Tensor, received: Tensor, name: str) -> int:
        received.copy_(torch.cat([bucket[:2] for bucket in buckets]))
        return -1

    monkeypatch.setattr(collectives, "_swap", swap)
    monkeypatch.setattr(collectives, "_all_to_all", all_to_all)
    monkeypatch.setattr(hvd, "synchronize", lambda handle: None)
    started = AllToAllReduceScatter(group).start(
        buckets[0], lambda received: received, "bucket", BufferPool()
    )
    total = started.finish()
    assert total.dtype == torch.float32
    assert total.tolist() == [1.0 + (ranks - 1) * small] * 2


class Adds:
    """Reduce-scatters of ranks in one process: whoever finishes gets the sum of what all have sent by then.

    Args:
        group: of the rank.
        sent: name → rank → bucket; shared by the ranks.
        add: goes to the first element of this rank's sums.
    """

    def __init__(self, group: Any, sent: dict[str, dict[int, Tensor]], add: float = 0.0) -> None:
        self.group, self.add = group, add
        self._sent = sent

    def start(self, wire: Tensor, decode: Callable[[Tensor], Tensor], name: str, pool: Any) -> Any:
        self._sent.setdefault(name, {})[self.group.rank] = wire

        def finish() -> Tensor:
            total = (
                torch.stack([*self._sent[name].values()]).sum(0).view(self.group.size, -1)[self.group.rank]
            )
            total[0] += self.add
            return total

        return SimpleNamespace(handle=-1, result=None, finish=finish)


class AddsInOrder(Adds, AllToAllReduceScatter):
    """As those whose sums have the same bits on whatever rank."""


@pytest.mark.parametrize("kind", [Adds, AddsInOrder])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_wrong_sum_is_reported_once_with_its_rank(wrong: int, kind: type[Adds]) -> None:
    """Catches the neighbour named in place of the rank whose sum was wrong, the first rank without a neighbour, and a
    sum that is reported again by later checks."""
    ranks = range(3)
    of_ranks: list[Any] = [None] * 3
    groups = [SimpleNamespace(rank=rank, size=3, all_gather_object=lambda *_: [*of_ranks]) for rank in ranks]
    first, second = dict[str, dict[int, Tensor]](), dict[str, dict[int, Tensor]]()
    checked = []
    for group in groups:
        one = CheckedReduceScatter(kind(group, first))  # type: ignore[arg-type]
        one._second = Adds(group, second)  # type: ignore[assignment]
        one.checking = True
        checked.append(one)
    buckets = [torch.arange(6.0) + 10 * rank for rank in ranks]

    def faults(names: tuple[str, ...], add: float) -> list[list[str]]:
        checked[wrong].exchange.add = add  # type: ignore[attr-defined]
        for name in names:
            started = [
                one.start(bucket, lambda x: x, name, BufferPool())
                for one, bucket in zip(checked, buckets, strict=True)
            ]
            for pending in started:
                pending.finish()
        of_ranks[:] = [one._sums for one in checked]
        return [one.faults() for one in checked]

    expected = (
        f"the sum of b that rank {wrong} received is not the one that rank {(wrong + 2) % 3} computed "
        "from the same gradients"
    )
    assert faults(("b",), 1.0) == [[expected]] * 3
    assert faults(("a",), 0.0) == [[]] * 3
    assert faults((), 0.0) == [[]] * 3
    for one in checked:
        one.checking = False
    assert faults(("b",), 1.0) == [[]] * 3


def test_a_gradient_that_is_written_while_a_copy_travels_is_seen() -> None:
    """Catches a gradient scaled past autograd (`.data`), in vain: what was sent before would take its place."""

    def sent(copied: bool = True) -> tuple[Tensor, InFlight]:
        gradient = torch.linspace(-1.0, 1.0, 3000).view(50, 60)
        gradient[0, 0] = torch.nan  # of the same bits it is no change
        return gradient, InFlight.of(gradient, copied=copied)

    gradient, remembered = sent()
    assert not remembered.changed(gradient)
    gradient.data.mul_(0.5)
    assert remembered.changed(gradient)
    gradient, remembered = sent()
    gradient.mul_(1.0)
    assert remembered.changed(gradient)
    gradient, remembered = sent()
    assert remembered.changed(gradient.clone())
    assert remembered.changed(None)
    gradient.data = gradient.data.clone()
    assert remembered.changed(gradient)
    gradient, remembered = sent(copied=False)  # Horovod writes into it meanwhile
    gradient.data.mul_(0.5)
    assert not remembered.changed(gradient)


@pytest.mark.parametrize("root", [0, 1])
def test_the_state_is_that_of_the_rank_that_is_asked_for(root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rank 0's settings and moments in place of those of `root_rank`, and moments of the rank's own that stay
    where the other has none."""

    def optimizer(rank: int) -> tuple[list[nn.Parameter], ARSG]:
        parameters = [nn.Parameter(torch.full((2,), float(rank))) for _ in range(2)]
        made = ARSG(parameters, lr=0.1 * (rank + 1), mu=0.1)
        for _ in range(rank + 1):
            for parameter in parameters[: 2 - rank]:
                parameter.grad = torch.full_like(parameter, rank + 1.0)
            made.step()
        return parameters, made

    sent = dict[str, Tensor]()
    described = dict[int, Any]()

    class OneOfTwo:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def all_gather_object(self, value: Any, what: str) -> list[Any]:
            if what == "optimizer_shapes":
                return [value, value]
            if self.rank == root:
                described[root] = value
            return [described.get(rank) for rank in range(2)]

    def broadcast_tensors(named: list[tuple[str, Tensor]], root_rank: int) -> None:
        assert root_rank == root
        for name, tensor in named:
            tensor.copy_(sent.setdefault(name, tensor.detach().clone()))

    monkeypatch.setattr(broadcast, "broadcast_parameters", broadcast_tensors)
    (theirs, from_root), (own, other) = optimizer(root), optimizer(1 - root)
    for rank, made in ((root, from_root), (1 - root, other)):
        monkeypatch.setattr(broadcast, "Group", lambda name, rank=rank: OneOfTwo(rank))
        broadcast.broadcast_optimizer_state(made, root_rank=root)
    assert [group["lr"] for group in other.param_groups] == [0.1 * (root + 1)]
    for parameter, source in zip(own, theirs, strict=True):
        held, expected = other.state.get(parameter, {}), from_root.state.get(source, {})
        assert held.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(torch.as_tensor(held[name]), torch.as_tensor(value)), name
    assert len([parameter for parameter in own if other.state.get(parameter)]) == 2 - root


def test_states_are_alike_by_their_values_wherever_those_lie() -> None:
    """Catches states that differ in the fifth digit of a learning rate on a device, which its text does not show, and
    equal ones that differ in what the text says beside the value."""
    lr = torch.tensor(0.1)
    outline = (
        [{"lr": lr, "betas": (0.9, 0.99), "mu": float("nan")}],
        {0: {"step": ("number", torch.tensor(3.0))}},
    )
    same = [{"lr": lr.clone().requires_grad_(), "betas": (0.9, 0.99), "mu": float("nan")}], outline[1]
    assert _alike(outline, same)
    for other in (
        ([{**outline[0][0], "lr": lr + 1e-7}], outline[1]),
        ([{**outline[0][0], "lr": lr.double()}], outline[1]),
        ([{**outline[0][0], "mu": 0.0}], outline[1]),
        ([{**outline[0][0], "betas": [0.9, 0.99]}], outline[1]),
        (outline[0], {0: {"step": ("number", 3.0)}}),
        (outline[0], {1: outline[1][0]}),
    ):
        assert not _alike(outline, other)


@pytest.mark.parametrize("elastic", [True, False])
def test_ranks_of_an_elastic_job_are_not_asked_for_their_hosts(
    elastic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that come later and wait for an answer of those that train; and hosts that nobody looks at."""
    asked: list[Any] = []
    for name in ("check_environment", "set_stall_defaults", "check_world_size", "HorovodCommunicator"):
        monkeypatch.setattr(communicator, name, lambda: None)
    monkeypatch.setattr(hvd, "init", lambda: None)
    monkeypatch.setattr(communicator, "in_elastic_job", lambda: elastic)
    monkeypatch.setattr(communicator, "check_hosts", asked.append)
    ranks: Any = None
    communicator.connect(ranks)
    assert len(asked) == (0 if elastic else 1)
