"""Trainings with a wrapped optimizer, written once for ranks (a share of the batch each) and for one process."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist import ARSG, ObservationBoost
from tests.support import toy

UPDATES = 6
ROWS = 24
Wrap = Callable[..., Any]


@dataclass
class Place:
    """Where a training runs: this rank's share, and how an optimizer is wrapped there."""

    rank: int = 0
    world_size: int = 1
    wrap: Wrap = lambda optimizer, **_: optimizer
    prefix: str = ""
    started_from: dict[str, Tensor] = field(default_factory=dict)

    def begins(self, model: Any) -> Any:
        self.started_from = finish(model)
        return model

    def share(self, *tensors: Tensor, part: int = 0, parts: int = 1) -> list[Tensor]:
        rows = len(tensors[0]) // (self.world_size * parts)
        start = (part * self.world_size + self.rank) * rows
        return [tensor[start : start + rows] for tensor in tensors]

    def wrapped(self, optimizer: Any, model: nn.Module, **settings: Any) -> Any:
        names = [(f"{self.prefix}.{name}", parameter) for name, parameter in model.named_parameters()]
        return self.wrap(optimizer, named_parameters=names, **settings)


class Routed(nn.Module):
    """Some rows take a branch of their own; a rank without such rows does not use its parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.branch, self.head = nn.Linear(17, 13), nn.Linear(13, 13), nn.Linear(13, 5)

    def forward(self, inputs: Tensor, special: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(inputs))
        if special.any():
            hidden = torch.where(special[:, None], torch.tanh(self.branch(hidden)), hidden)
        return self.head(hidden)


def special_rows(update: int) -> Tensor:
    """The first or the last rows of the batch: on two or more ranks one rank has them all."""
    rows = torch.zeros(ROWS, dtype=torch.bool)
    rows[slice(0, 4) if update % 2 else slice(20, 24)] = True
    return rows


def arsg(parameters: Any, **settings: Any) -> ARSG:
    return ARSG(parameters, **(toy.HYPERPARAMETERS | settings))


def finish(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def backward(place: Place, model: nn.Module, update: int, *, part: int = 0, parts: int = 1) -> Tensor:
    inputs, targets = place.share(*toy.batch(update), part=part, parts=parts)
    loss = toy.loss_of(model(inputs), targets) / parts
    loss.backward()
    return loss


def plain(place: Place, **settings: Any) -> dict[str, Tensor]:
    model = place.begins(toy.build_model())
    optimizer = place.wrapped(arsg(model.parameters()), model, **settings)
    for update in range(UPDATES):
        optimizer.zero_grad(set_to_none=update % 2 == 0)
        backward(place, model, update)
        optimizer.step()
    return finish(model)


def gradients_summed(place: Place) -> dict[str, Tensor]:
    """op=Sum of losses divided by the number of ranks, synchronized by hand without skip_synchronize."""
    import horovod.torch as hvd

    model = place.begins(toy.build_model())
    optimizer = place.wrapped(arsg(model.parameters()), model, op=hvd.Sum)
    for update in range(UPDATES):
        optimizer.zero_grad()
        inputs, targets = place.share(*toy.batch(update))
        (toy.loss_of(model(inputs), targets) / place.world_size).backward()
        if place.world_size > 1:
            optimizer.synchronize()
        optimizer.step()
    return finish(model)


def accumulated(place: Place) -> dict[str, Tensor]:
    """Two backward passes per step, then one."""
    model = place.begins(toy.build_model())
    optimizer = place.wrapped(arsg(model.parameters()), model, backward_passes_per_step=2)
    for update in range(UPDATES):
        parts = 2 if update < 3 else 1
        if update == 3 and hasattr(optimizer, "set_backward_passes_per_step"):
            optimizer.set_backward_passes_per_step(1)
        for part in range(parts):
            backward(place, model, update, part=part, parts=parts)
        optimizer.step()
        optimizer.zero_grad()
    return finish(model)


def clipped(place: Place) -> dict[str, Tensor]:
    """Horovod's idiom for clipping, under torch's gradient scaler."""
    model = place.begins(toy.build_model())
    optimizer = place.wrapped(arsg(model.parameters()), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for update in range(UPDATES):
        optimizer.zero_grad()
        inputs, targets = place.share(*toy.batch(update))
        scaler.scale(toy.loss_of(model(inputs), targets)).backward()
        if place.world_size > 1:
            optimizer.synchronize()
        scaler.unscale_(optimizer)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 0.5
        if place.world_size > 1:
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
    return finish(model)


def closures(place: Place) -> dict[str, Tensor]:
    model = place.begins(toy.build_model())
    optimizer = place.wrapped(arsg(model.parameters()), model)
    for update in range(UPDATES):

        def closure(update: int = update) -> Tensor:
            optimizer.zero_grad()
            return backward(place, model, update)

        optimizer.step(closure)
    return finish(model)


def routed(place: Place, groups: Any = None) -> dict[str, Tensor]:
    """Parameters that only one rank uses, another one in each update."""
    model = place.begins(Routed())
    if groups == "lists":
        groups = [[model.body.weight, model.branch.weight], [model.branch.bias, model.head.bias]]
    optimizer = place.wrapped(arsg(model.parameters()), model, groups=groups)
    for update in range(UPDATES):
        optimizer.zero_grad()
        inputs, targets, special = place.share(*toy.batch(update), special_rows(update))
        toy.loss_of(model(inputs, special), targets).backward()
        optimizer.step()
    return finish(model)


def grown(place: Place, groups: Any = None) -> dict[str, Tensor]:
    """A layer is added as a parameter group, another is unfrozen, and a third is frozen, all after wrapping."""
    model = place.begins(toy.build_model())
    model[0].requires_grad_(False)
    optimizer = place.wrapped(arsg([*model[0].parameters(), *model[2].parameters()]), model, groups=groups)
    for update in range(UPDATES):
        if update == 1:
            optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
        if update == 2:
            model[0].requires_grad_(True)
        model[2].requires_grad_(update not in (3, 4))
        optimizer.zero_grad()
        backward(place, model, update)
        optimizer.step()
        # Not the optimizer's parameters yet: their gradients are of no interest.
        if update == 0:
            model[4].zero_grad()
    return finish(model)


def halves(place: Place) -> dict[str, Tensor]:
    """bfloat16 parameters."""
    model = place.begins(toy.build_model().bfloat16())
    optimizer = place.wrapped(arsg(model.parameters(), lr=0.1), model)
    for update in range(UPDATES):
        optimizer.zero_grad()
        inputs, targets = (t.bfloat16() for t in place.share(*toy.batch(update)))
        toy.loss_of(model(inputs).float(), targets.float()).backward()
        optimizer.step()
    return finish(model)


def channels_last(place: Place) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 9, 5))
    model = place.begins(model.to(memory_format=torch.channels_last))
    optimizer = place.wrapped(arsg(model.parameters()), model)
    generator = torch.Generator().manual_seed(1)
    for update in range(UPDATES):
        optimizer.zero_grad()
        images = torch.randn(ROWS, 3, 5, 5, generator=generator)
        images, targets = place.share(images, toy.batch(update)[1])
        toy.loss_of(model(images.to(memory_format=torch.channels_last)), targets).backward()
        assert not model[0].weight.grad.is_contiguous()
        optimizer.step()
    return finish(model)


def complex_numbers(place: Place) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = place.begins(nn.Linear(17, 5, dtype=torch.complex64))
    optimizer = place.wrapped(arsg(model.parameters()), model)
    for update in range(UPDATES):
        optimizer.zero_grad()
        inputs, targets = place.share(*toy.batch(update))
        toy.loss_of(model(torch.complex(inputs, inputs.flip(1))).abs(), targets).backward()
        optimizer.step()
    return finish(model)


def embedded(place: Place) -> dict[str, Tensor]:
    """An embedding with sparse gradients, sent as dense ones."""
    torch.manual_seed(0)
    sparse = place.world_size > 1
    model = nn.ModuleDict(
        {"table": nn.EmbeddingBag(11, 5, sparse=sparse, mode="sum"), "head": nn.Linear(5, 5)}
    )
    place.begins(model)
    optimizer = place.wrapped(arsg(model.parameters()), model, sparse_as_dense=True)
    words = torch.arange(ROWS * 2).reshape(ROWS, 2) % 11
    for update in range(UPDATES):
        optimizer.zero_grad()
        rows, targets = place.share((words + update) % 11, toy.batch(update)[1])
        toy.loss_of(model["head"](model["table"](rows)), targets).backward()
        optimizer.step()
    return finish(model)


def trained_before(place: Place) -> dict[str, Tensor]:
    """Three updates with the whole batch, then wrapped; a scheduler and a boost made before go on; θ is visited."""
    model = place.begins(toy.build_model())
    optimizer: Any = arsg(model.parameters(), mu=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    boost = ObservationBoost(optimizer, [4])
    whole = Place()
    for update in range(UPDATES):
        if update == 3:
            optimizer = place.wrapped(optimizer, model)
        optimizer.zero_grad()
        backward(place if update >= 3 else whole, model, update)
        optimizer.step()
        schedule.step()
        boost.step()
        with optimizer.base_iterate():
            pass
    assert optimizer.param_groups[0]["mu"] == 0.1, "the boost did not reach the wrapped optimizer"
    return finish(model)


def pickled(place: Place) -> dict[str, Tensor]:
    """Saved, loaded and copied in the middle of a training, together with its model."""
    model = place.begins(toy.build_model())
    optimizer = place.wrapped(arsg(model.parameters()), model)
    for update in range(UPDATES):
        optimizer.zero_grad()
        backward(place, model, update)
        optimizer.step()
        if update == 2:
            model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
        if update == 4:
            model, optimizer = copy.deepcopy((model, optimizer))
    return finish(model)


def adam(place: Place) -> dict[str, Tensor]:
    """Another optimizer than ARSG, wrapped after two updates."""
    model = place.begins(toy.build_model())
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.02, amsgrad=True, eps=1e-3)
    for update in range(UPDATES):
        if update == 2:
            optimizer = place.wrapped(optimizer, model)
        optimizer.zero_grad()
        backward(place if update >= 2 else Place(), model, update)
        optimizer.step()
    return finish(model)


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        run: the training.
        settings: its arguments beside the place, on ranks.
        relative: tolerance where it is not that of sums in another order.
        plain_horovod: what plain `hvd.DistributedOptimizer` does: "same" as one process, "wrong" weights, "hangs",
            or the error's class name.
    """

    run: Callable[..., dict[str, Tensor]]
    plain_horovod: str
    settings: dict[str, Any] = field(default_factory=dict)
    relative: float | None = None


BFLOAT16 = 0.1  # weights without fp32 masters; how gradients are rounded is looked at exactly elsewhere

CASES = {
    "plain": Case(plain, "TypeError"),
    "accumulated": Case(accumulated, "same"),
    "clipped": Case(clipped, "same"),
    "summed": Case(gradients_summed, "wrong"),
    "closures": Case(closures, "wrong"),
    "predivided": Case(plain, "TypeError", {"gradient_predivide_factor": 4.0}),
    "fp16": Case(plain, "TypeError", {"compression": "fp16"}, relative=4e-3),
    "routed": Case(routed, "same"),
    "routed in 2 groups": Case(routed, "hangs", {"groups": 2}),
    "routed in lists": Case(routed, "hangs", {"groups": "lists"}),
    "grown": Case(grown, "wrong"),
    "grown in 2 groups": Case(grown, "wrong", {"groups": 2}),
    "bf16": Case(halves, "ValueError", relative=BFLOAT16),
    "channels last": Case(channels_last, "ValueError"),
    "complex": Case(complex_numbers, "ValueError"),
    "sparse": Case(embedded, "RuntimeError"),
    "trained before": Case(trained_before, "wrong"),
    "pickled": Case(pickled, "PicklingError"),
    "adam": Case(adam, "wrong"),
}
