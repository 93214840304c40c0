"""What Horovod's own tests do with an optimizer: written once for plain Horovod, for ours and for one process."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from horovod.torch import functions
from torch import Tensor, nn

from arsg_dist import ARSG, RemoteObservation
from arsg_dist.horovod import DistributedOptimizer, ShardedOptimizer, broadcast

RANKS = 2
FORMS = ("horovod", "replicated", "sharded")
_WRAP = {"horovod": hvd.DistributedOptimizer, "replicated": DistributedOptimizer, "sharded": ShardedOptimizer}
Weights = dict[str, Tensor]


@contextmanager
def horovods_broadcasts() -> Iterator[None]:
    """Horovod's own, which importing `arsg_dist.horovod` replaces."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (hvd, functions):
            patch.setattr(module, "broadcast_parameters", broadcast._horovod_parameters)
            patch.setattr(module, "broadcast_optimizer_state", broadcast._horovod_state)
        yield


@dataclass
class Place:
    """Where a case runs: on one of two ranks with one form of optimizer, or alone with the data of both."""

    form: str = "alone"
    rank: int = 0
    name: str = ""
    started_from: Weights = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        return self.form == "alone"

    def wrapped(
        self, optimizer: Any, named: Iterable[tuple[str, Tensor]] | None = None, **settings: Any
    ) -> Any:
        if self.alone:
            return optimizer
        if named is not None:
            named = [(f"{self.name}.{self.form}.{name}", parameter) for name, parameter in named]
        return _WRAP[self.form](optimizer, named, **settings)

    def backward(self, loss_of_rank: Callable[[int], Tensor]) -> None:
        ranks = range(RANKS) if self.alone else [self.rank]
        (sum(loss_of_rank(rank) for rank in ranks) / len(ranks)).backward()  # type: ignore[union-attr]

    def horovods(self) -> Any:
        return horovods_broadcasts() if self.form == "horovod" else nullcontext()

    def begins(self, model: nn.Module) -> None:
        """Weights from here on are what a training moves."""
        self.started_from = weights_of(model)


def weights_of(*models: nn.Module) -> Weights:
    return {
        f"{number}.{name}": parameter.detach().clone()
        for number, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }


def inputs_of(rank: int, update: int, rows: int = 3) -> Tensor:
    return torch.sin(torch.arange(4.0 * rows).view(rows, 4) * (1 + rank) + 3 * update)


class TwoHeads(nn.Module):
    """The second head sits on the first; a rank that uses the first alone has no gradient of the second."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.first, self.second = (
            nn.Linear(*sizes, bias=False) for sizes in ((4, 5), (5, 3), (3, 3))
        )

    def loss(self, rank: int, update: int) -> Tensor:
        first: Tensor = self.first(torch.tanh(self.body(inputs_of(rank, update))))
        return (self.second(torch.tanh(first)) if rank else first).sub(rank + 1).square().mean()


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


def loss_of(model: nn.Module, rank: int, update: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    return model(inputs_of(rank, update).to(dtype)).float().sub(rank).square().mean()


def step(optimizer: Any, *, skip: bool = False) -> None:
    with optimizer.skip_synchronize() if skip else nullcontext():
        optimizer.step()


# ---- Every optimizer of torch --------------------------------------------------------------------

OPTIMIZERS = {
    name: kind
    for name, kind in sorted({**vars(torch.optim), "ARSG": ARSG}.items())
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "SparseAdam", "LBFGS")
}
OPTIONS: dict[str, dict[str, Any]] = {
    "all": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "centered": True, "amsgrad": True},
    "lr": {"lr": 0.01},
}
OF_RANKS: list[dict[str, Any]] = [
    {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.2, "nesterov": True, "betas": (0.9, 0.999)}
    | {"etas": (0.8, 2.4), "step_sizes": (1e-5, 100)},
    {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": False, "betas": (0.8, 0.9)}
    | {"etas": (0.25, 1.75), "step_sizes": (1e-7, 5)},
]


def taken(kind: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those that the class knows."""
    return {name: value for name, value in options.items() if name in inspect.signature(kind).parameters}


def remote(parameters: Any, lr: float) -> RemoteObservation:
    inner = torch.optim.AdamW(parameters, lr=lr, betas=(0.0, 0.9), eps=1e-2)
    return RemoteObservation(inner, mu=0.2, beta1=0.9)


def made(place: Place, model: nn.Module, name: str, options: dict[str, Any]) -> Any:
    kind: Any = OPTIMIZERS.get(name, remote)
    return place.wrapped(kind(model.parameters(), **taken(kind, options)), model.named_parameters())


def one_update(place: Place, model: TwoHeads, optimizer: Any, update: int) -> None:
    optimizer.zero_grad()
    place.backward(lambda rank: model.loss(rank, update))
    optimizer.step()


def closed(optimizer: Any, *models: nn.Module) -> Weights:
    weights = weights_of(*models)
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.close()
    return weights


def resumed_by_rank_0(place: Place, optimizer: str, options: str) -> Weights:
    """test_broadcast_state: rank 0 alone loads a file; the others have other weights and no state.

    With the model of test_force_allreduce.
    """
    model = TwoHeads()
    first = made(place, model, optimizer, OPTIONS[options])
    one_update(place, model, first, 0)
    saved = copy.deepcopy((model.state_dict(), first.state_dict()))
    closed(first)

    place.begins(model)
    model = TwoHeads(seed=1 + place.rank)
    again = made(place, model, optimizer, OPTIONS[options])
    if place.rank == 0:
        model.load_state_dict(saved[0])
    if place.form == "sharded":
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        again.load_state_dict(saved[1] if place.rank == 0 else None)
        if place.rank == 0:
            assert_same_state(again.state_dict(), saved[1])
        else:
            again.state_dict()
    else:
        if place.rank == 0:
            again.load_state_dict(saved[1])
        if not place.alone:
            with place.horovods():  # the state first, for Horovod makes a step where there is none
                hvd.broadcast_optimizer_state(again, root_rank=0)
                hvd.broadcast_parameters(list(model.named_parameters()), root_rank=0)
            assert_same_state(again.state_dict(), hvd.broadcast_object(saved[1], root_rank=0))
    for update in (1, 2):  # in one of them Rprop may leave all of a tensor alone
        one_update(place, model, again, update)
    return closed(again, model)


def assert_same_state(found: dict[str, Any], saved: dict[str, Any]) -> None:
    """Values and kinds of values."""
    assert found["state"].keys() == saved["state"].keys()
    for place, entry in saved["state"].items():
        assert found["state"][place].keys() == entry.keys()
        for name, value in entry.items():
            other = found["state"][place][name]
            assert type(other) is type(value), (name, other, value)
            if isinstance(value, Tensor):
                assert other.dtype == value.dtype, name
                assert torch.equal(other, value), (place, name)
            else:
                assert other == value, name


def options_of_rank_0(place: Place, optimizer: str) -> Weights:
    """test_broadcast_state_options: every rank has options of its own, until it gets those of rank 0."""
    model = TwoHeads()
    place.begins(model)
    distributed = made(place, model, optimizer, OF_RANKS[place.rank])
    expected = taken(OPTIMIZERS[optimizer], OF_RANKS[0])
    if place.form == "replicated":
        place.backward(lambda rank: model.loss(rank, 0))
        with pytest.raises(RuntimeError, match=r"of group 0 is .* on rank 0, .* on rank 1"):
            distributed.step()
        hvd.broadcast_optimizer_state(distributed, root_rank=0)
    for update in range(2):
        one_update(place, model, distributed, update)
        if place.form == "horovod" and update == 0:
            with horovods_broadcasts():
                hvd.broadcast_optimizer_state(distributed, root_rank=0)
                hvd.broadcast_parameters(list(model.parameters()), root_rank=0)
    for name, value in expected.items():
        found = distributed.param_groups[0][name]
        assert type(found) is type(value), (name, found)
        assert found == value, name
    return closed(distributed, model)


# ---- Ways to train -------------------------------------------------------------------------------


def trained(
    place: Place,
    passes: Iterable[int] = (1, 1, 1),
    dtype: torch.dtype = torch.float32,
    lists: bool = False,
    named: bool = True,
    **settings: Any,
) -> Weights:
    """Updates with so many backward passes each."""
    model = small(dtype=dtype)
    place.begins(model)
    if lists:  # the last two parameters are in none of them
        settings["groups"] = [[model[2].weight, model[0].bias], [model[0].weight]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    distributed = place.wrapped(optimizer, model.named_parameters() if named else None, **settings)
    share = RANKS if settings.get("op") == hvd.Sum and not place.alone else 1
    for update, backwards in enumerate(passes):
        distributed.zero_grad()
        for number in range(backwards):
            place.backward(lambda rank, now=update + 5 * number: loss_of(model, rank, now) / share)
        distributed.step()
    return closed(distributed, model)


def stepped_twice(place: Place) -> Weights:
    """The second time with the same gradients, which Horovod averages again."""
    model = small()
    place.begins(model)
    optimizer = place.wrapped(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model.named_parameters()
    )
    place.backward(lambda rank: loss_of(model, rank, 0))
    optimizer.step()
    optimizer.step()
    return closed(optimizer, model)


def lbfgs_resumed(place: Place) -> Weights:
    """As test_broadcast_state, for an optimizer whose state has lists of tensors and no value in places."""

    def begun(seed: int) -> tuple[nn.Module, Any]:
        model = small(seed)
        settings = {"lr": 0.3, "max_iter": 4, "line_search_fn": "strong_wolfe"}
        return model, place.wrapped(
            torch.optim.LBFGS(model.parameters(), **settings), model.named_parameters()
        )

    def update(model: nn.Module, optimizer: Any, number: int) -> None:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            place.backward(lambda rank: loss_of(model, rank, number))
            with torch.no_grad():
                ranks = range(RANKS) if place.alone else [place.rank]
                return torch.stack([loss_of(model, rank, number) for rank in ranks]).mean()

        optimizer.step(evaluate)

    model, optimizer = begun(0)
    if place.form != "horovod":  # there every rank would search its own way
        update(model, optimizer, 0)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    place.begins(model)
    model, optimizer = begun(1 + place.rank)
    if place.rank == 0:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    if not place.alone:
        with place.horovods():
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    update(model, optimizer, 1)
    return weights_of(model)


def alternating(place: Place) -> Weights:
    """test_dynamic_requires_grad: generator and discriminator in turn, the other one frozen."""
    torch.manual_seed(0)
    models = nn.Linear(4, 3), nn.Linear(3, 1)
    place.started_from = weights_of(*models)
    optimizers = [
        place.wrapped(
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            [(f"{number}.{name}", p) for name, p in model.named_parameters()],
        )
        for number, model in enumerate(models)
    ]
    for update in range(4):
        turn = update % 2
        for number, model in enumerate(models):
            model.requires_grad_(number == turn)
            optimizers[number].zero_grad()
        place.backward(lambda rank, now=update: models[1](models[0](inputs_of(rank, now))).square().sum())
        for number, model in enumerate(models):
            assert all((p.grad is not None) == (number == turn) for p in model.parameters())
        optimizers[turn].step()
    weights = weights_of(*models)
    for optimizer in optimizers:
        closed(optimizer)
    return weights


def clipped(place: Place, skip: bool) -> Weights:
    """test_gradient_clipping; without `skip` test_synchronize_step_warning."""
    model = small()
    place.begins(model)
    optimizer = place.wrapped(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for update in range(2):
        optimizer.zero_grad()
        place.backward(lambda rank, now=update: loss_of(model, rank, now))
        if not place.alone:
            optimizer.synchronize()
        if place.form == "sharded":
            norm = optimizer.clip_grad_norm_(0.1)
        else:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step(optimizer, skip=skip and not place.alone)
        # Horovod exchanges them again then, which an average does not show
        assert ("without optimizer.skip_synchronize()" in " ".join(str(each.message) for each in said)) == (
            place.form == "horovod" and not skip
        )
    return closed(optimizer, model)


def two_groups_without_names(place: Place) -> Weights:
    """test_optimizer_no_named_parameters."""
    model = small()
    place.begins(model)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.3}]
    optimizer = place.wrapped(torch.optim.SGD(groups, lr=0.1))
    if not place.alone:
        names = optimizer._parameter_names
        assert names.keys() == set(model.parameters())
        assert len(set(names.values())) == 4
        mine = [names[parameter] for parameter in model.parameters()]
        assert hvd.allgather_object(mine) == [mine] * RANKS
    for update in range(2):
        optimizer.zero_grad()
        place.backward(lambda rank, now=update: loss_of(model, rank, now))
        optimizer.step()
    return closed(optimizer, model)


class Chosen(nn.Module):
    """Whole numbers among the parameters, without gradient, say which others count."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.which = nn.Parameter(torch.tensor([1, 3]) - rank, requires_grad=False)
        self.values = nn.Parameter(torch.arange(1.0, 5) + rank)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.values[self.which] * inputs


def with_whole_numbers(place: Place) -> Weights:
    """test_broadcast_state_no_grad; the broadcasts in their usual order, and an update."""
    model = Chosen(place.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=True)
    optimizer = place.wrapped(optimizer, model.named_parameters())
    if not place.alone:
        with place.horovods():
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            if place.form != "sharded":
                hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        assert torch.equal(model.which, torch.tensor([1, 3]))
        assert model.which.grad is None
        assert (model.values.grad is None) == (place.form != "horovod")
    place.started_from = {"0.values": torch.arange(1.0, 5)}
    optimizer.zero_grad()
    place.backward(lambda rank: model(torch.tensor([1.0, 2.0 + rank])).sum())
    optimizer.step()
    return {"0.values": closed(optimizer, model)["0.values"]}


def embedded(place: Place, optimizer: str, **settings: Any) -> Weights:
    """test_sparse_embeddings."""
    torch.manual_seed(0)
    model = nn.Embedding(10, 3, sparse=True)
    place.begins(model)
    words = [torch.tensor([[1, 2, 4, 5], [4, 3, 2, 9]]), torch.tensor([[1, 3, 4], [4, 7, 9]])]
    plain = getattr(torch.optim, optimizer)(list(model.parameters()), lr=0.1)
    distributed = place.wrapped(plain, **settings)
    for _ in range(2):
        distributed.zero_grad()
        place.backward(lambda rank: model(words[rank]).square().sum())
        distributed.step()
    return closed(distributed, model)


# ---- What is refused -----------------------------------------------------------------------------


def same_names(place: Place) -> Weights:
    """test_duplicate_names: two models, each of which has a weight and a bias."""
    models = nn.Linear(1, 1), nn.Linear(1, 1)
    parameters = [parameter for model in models for parameter in model.parameters()]
    named = [pair for model in models for pair in model.named_parameters()]
    place.wrapped(torch.optim.SGD(parameters, lr=0.1), named)
    raise AssertionError("accepted")


def names_of_half(place: Place) -> Weights:
    """test_missing_named_parameters."""
    model = small()
    place.wrapped(torch.optim.SGD(model.parameters(), lr=0.1), list(model.named_parameters())[:2])
    raise AssertionError("accepted")


def one_pass_too_many(place: Place) -> Weights:
    model = small()
    optimizer = place.wrapped(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    place.backward(lambda rank: loss_of(model, rank, 0))
    try:
        place.backward(lambda rank: loss_of(model, rank, 0))
    finally:
        with suppress(RuntimeError):  # of ours: the second pass has changed a gradient in flight
            optimizer.synchronize()
        closed(optimizer)
    raise AssertionError("accepted")


def cleared_in_flight(place: Place) -> Weights:
    model = small()
    optimizer = place.wrapped(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    place.backward(lambda rank: loss_of(model, rank, 0))
    try:
        optimizer.zero_grad()
    finally:
        optimizer.synchronize()
        closed(optimizer)
    raise AssertionError("accepted")


@dataclass(frozen=True)
class Case:
    """What is done, and what comes of it.

    Attributes:
        run: the training.
        settings: its arguments.
        differs: form → a part of the message with which it is refused, or "other values", where it is not the value of
            one process.
        relative: tolerance where it is not that of sums in another order.
        forms: in which it is done.
    """

    run: Callable[..., Weights]
    settings: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    relative: float | None = None
    forms: tuple[str, ...] = FORMS


NO_SHARDS = {"sharded": "is not known to update every element of a parameter by itself"}
WHOLE = dict.fromkeys(("Adafactor", "LBFGS", "Muon", "SparseAdam"), NO_SHARDS)
IN_BUCKETS = {"sharded": "gradients travel in buckets (bucket_mb)"}
FP16 = hvd.Compression.fp16
ROUNDED = 4e-3

CASES: dict[str, Case] = {
    **{
        f"{name}, resumed, {options}": Case(
            resumed_by_rank_0,
            {"optimizer": name, "options": options},
            WHOLE.get(name, {}),
            relative=1e-3,
            # Sharded the others are in tests/horovod/test_sharded.py.
            forms=FORMS if options == "all" and name in ("ARSG", "AdamW", "Muon", "RMSprop") else FORMS[:2],
        )
        for name in OPTIMIZERS
        for options in OPTIONS
    },
    **{
        f"{name}, options of ranks": Case(
            options_of_rank_0,
            {"optimizer": name},
            WHOLE.get(name, {"sharded": "settings of its groups (lr, ...) of rank 1"}),
            relative=1e-3,
        )
        for name in OPTIMIZERS
    },
    "RemoteObservation, resumed": Case(
        resumed_by_rank_0,
        {"optimizer": "RemoteObservation", "options": "lr"},
        {"horovod": "RemoteObservation goes around an optimizer"},  # its wrapper makes the class anew
        relative=1e-3,
    ),
    "stepped twice": Case(stepped_twice, {}, {"sharded": "and cannot serve another step()"}),
    "LBFGS, resumed": Case(
        lbfgs_resumed, {}, {"horovod": "cannot broadcast torch.optim.LBFGS state", **NO_SHARDS}, 1e-3
    ),
    "two passes": Case(trained, {"passes": (2, 2, 2), "backward_passes_per_step": 2}),
    "an early step": Case(trained, {"passes": (2, 1, 2), "backward_passes_per_step": 2}),
    "sum": Case(trained, {"op": hvd.Sum}),
    "predivided": Case(trained, {"gradient_predivide_factor": 2.0}),
    "predivided, fp16": Case(
        trained, {"gradient_predivide_factor": 4.0, "compression": FP16}, relative=ROUNDED
    ),
    "num_groups": Case(trained, {"num_groups": 2}, IN_BUCKETS),
    "one group": Case(trained, {"groups": 1}, IN_BUCKETS),
    "more groups than parameters": Case(trained, {"groups": 9}, IN_BUCKETS),
    "lists of parameters": Case(trained, {"lists": True}, IN_BUCKETS),
    "lists of parameters, fp16": Case(trained, {"lists": True, "compression": FP16}, IN_BUCKETS, ROUNDED),
    "groups, two passes": Case(
        trained, {"passes": (2, 2, 2), "groups": 2, "backward_passes_per_step": 2}, IN_BUCKETS
    ),
    "groups, an early step": Case(
        trained, {"passes": (2, 1, 2), "groups": 2, "backward_passes_per_step": 2}, IN_BUCKETS
    ),
    "fp16": Case(trained, {"compression": FP16}, relative=ROUNDED),
    "fp16 of fp64": Case(trained, {"compression": FP16, "dtype": torch.float64}, relative=ROUNDED),
    "fp16 of bf16": Case(trained, {"compression": FP16, "dtype": torch.bfloat16}, relative=0.1),
    "fp64": Case(trained, {"dtype": torch.float64}),
    "half": Case(trained, {"dtype": torch.float16}, relative=0.1),
    "no names": Case(trained, {"named": False}),
    "two groups without names": Case(two_groups_without_names),
    "alternating": Case(alternating),
    "clipped": Case(clipped, {"skip": True}),
    "clipped, without skip_synchronize": Case(clipped, {"skip": False}),
    "whole numbers": Case(with_whole_numbers, {}, {"horovod": "other values"}),
    **{
        f"embedded, {name}, {'dense' if dense else 'sparse'}": Case(
            embedded,
            {"optimizer": name, "sparse_as_dense": dense},
            WHOLE.get(name, {} if dense else {"sharded": "give sparse_as_dense=True"}),
        )
        for name in ("SGD", "Adagrad", "SparseAdam")
        for dense in (False, True)
    },
    "same names": Case(
        same_names,
        {},
        {"horovod": "must be unique", "replicated": "must be unique", "sharded": "must be unique"},
    ),
    "names of half": Case(
        names_of_half,
        {},
        {
            "horovod": "were not named",
            "replicated": "is not in named_parameters",
            "sharded": "has no name for 2",
        },
    ),
    "one pass too many": Case(
        one_pass_too_many,
        {},
        {
            "horovod": "more than backward_passes_per_step times",
            "replicated": "more than backward_passes_per_step times",
            "sharded": "call optimizer.zero_grad()",
        },
    ),
    "cleared in flight": Case(
        cleared_in_flight,
        {},
        {
            "horovod": "before optimizer.step() or optimizer.synchronize()",
            "replicated": "between backward() and step() or synchronize()",
            "sharded": "before step(): other ranks already",
        },
    ),
}
