"""The configurations in which a sharded optimizer is compared with one process, and that process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from arsg_dist import ARSG, Lion, RemoteObservation
from arsg_dist.optim import ObservationBoost
from tests.support import toy

ARSG_SETTINGS: dict[str, Any] = {**toy.HYPERPARAMETERS, "foreach": False, "fused": False}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "arsg": lambda parameters: ARSG(parameters, **ARSG_SETTINGS),
    "adamw": lambda parameters: torch.optim.AdamW(
        parameters, lr=0.01, eps=1e-2, weight_decay=1e-2, amsgrad=True
    ),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-2),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01, eps=1e-2),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, eps=1e-2),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-2, weight_decay=1e-2),
    "adamax": lambda parameters: torch.optim.Adamax(parameters, lr=0.01, eps=1e-2),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=0.01, eps=1e-2),
    "rmsprop": lambda parameters: torch.optim.RMSprop(
        parameters, lr=0.01, eps=1e-2, momentum=0.9, centered=True
    ),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
    "adadelta": lambda parameters: torch.optim.Adadelta(parameters, lr=1.0, eps=1e-3),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, lr=1e-3, t0=2.0),
    "lion": lambda parameters: Lion(parameters, lr=1e-3, weight_decay=1e-2),
    "remote": lambda parameters: RemoteObservation(
        torch.optim.AdamW(parameters, lr=0.002, betas=(0.0, 0.9), eps=1e-2), mu=0.2, beta1=0.9
    ),
}


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        name: says what is special.
        optimizer: key of `OPTIMIZERS`.
        dtype: of the model.
        passes: backward passes per update and rank.
        clip: largest norm of the gradient, 0 for none.
        norm_type: of it.
        clip_idiom: "method": clip, then step; "horovod": with synchronize() and skip_synchronize().
        groups: whether there are several groups of different settings.
        total: gradients are summed, not averaged, over the ranks.
        scaler: with torch's GradScaler, and an infinite gradient on one rank in one update.
        boost: with a scheduler and an observation boost.
        closure: steps with one.
        compression: of gradients, "none" or "fp16".
        relative: largest difference, as a share of the movement.
        arguments: of ShardedOptimizer.
    """

    name: str
    optimizer: str = "arsg"
    dtype: torch.dtype = torch.float32
    passes: int = 1
    clip: float = 0.0
    norm_type: float = 2.0
    clip_idiom: str = "method"
    groups: bool = False
    total: bool = False
    scaler: bool = False
    boost: bool = False
    closure: bool = False
    compression: str = "none"
    relative: float = 2e-5
    arguments: dict[str, Any] = field(default_factory=dict)


OVERFLOW_AT = 2

CASES = (
    Case("arsg"),
    Case("adamw", optimizer="adamw"),
    Case("sgd with momentum", optimizer="sgd"),
    Case("nadam", optimizer="nadam"),
    Case("adagrad, which has state from the start", optimizer="adagrad"),
    Case("accumulation", passes=2),
    Case("clipping", clip=0.5),
    Case("clipping with Horovod's idiom", clip=0.5, clip_idiom="horovod", passes=2),
    Case("clipping by the largest element", clip=0.1, norm_type=float("inf")),
    Case("groups", groups=True, clip=0.5, passes=2),
    Case("adamw in groups", groups=True, optimizer="adamw"),
    Case("bf16", dtype=torch.bfloat16, relative=1e-3),
    Case("bf16 in groups", dtype=torch.bfloat16, groups=True, passes=2, relative=1e-3),
    Case("fp16", dtype=torch.float16, clip=0.5, relative=1e-3),
    Case("fp64", dtype=torch.float64, relative=1e-9),
    Case("sum", total=True),
    Case("predivided", arguments={"gradient_predivide_factor": 4.0}),
    Case("eager", arguments={"gather": "eager"}),
    Case("one bucket", arguments={"bucket_mb": 16.0}),
    Case("grad scaler", scaler=True, groups=True),
    Case("grad scaler and clipping", scaler=True, clip=0.5, clip_idiom="horovod"),
    Case("boost and schedule", boost=True, groups=True),
    Case("closure", closure=True),
    Case("remote observation", optimizer="remote", groups=True, clip=0.5, passes=2),
    Case("remote observation in bf16", optimizer="remote", dtype=torch.bfloat16, relative=1e-3),
    Case("remote observation, boosted", optimizer="remote", boost=True),
    # The reference rounds as well: a compression that is not applied would differ by a thousand times more.
    Case("compression", compression="fp16", passes=2),
)

OTHER_OPTIMIZERS = tuple(
    Case(name, optimizer=name)
    for name in ("adam", "adamax", "radam", "rmsprop", "rprop", "adadelta", "asgd", "lion")
)
"""The rest of what is taken to update each element by itself."""


class Patchwork(nn.Module):
    """What models have: layers used or not depending on the rank, never, frozen, shared, a weight used past its module.

    In channels_last there is a convolution, and a parameter without dimension.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
        self.lift = nn.Linear(20, 17)
        self.used = nn.Sequential(nn.Linear(17, 101), nn.Tanh(), nn.Linear(101, 67), nn.Tanh())
        self.past = nn.Linear(67, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.sometimes = nn.Linear(5, 5)
        self.unused = nn.Linear(7, 3)
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, inputs: Tensor, detour: bool) -> Tensor:
        images = self.conv(inputs.view(-1, 3, 3, 3))
        hidden = self.used(self.lift(images.flatten(1)))
        outputs: Tensor = self.frozen(functional.linear(hidden, self.past.weight, self.past.bias))
        if detour:
            outputs = outputs + self.sometimes(outputs)
        return outputs * self.scale


def batch(update: int, rank: int, step: int) -> tuple[Tensor, Tensor]:
    """One micro-batch of one rank."""
    generator = torch.Generator().manual_seed(10_000 + 997 * update + 31 * rank + step)
    return 3 * torch.randn(6, 27, generator=generator), 5 * torch.randn(6, 5, generator=generator)


def loss_of(model: nn.Module, case: Case, update: int, rank: int, step: int) -> Tensor:
    """The loss of a micro-batch; ranks take the detour in turns, so their unused parameters differ."""
    inputs, targets = batch(update, rank, step)
    dtype = next(model.parameters()).dtype
    loss = toy.loss_of(model(inputs.to(dtype), (rank + update) % 3 == 0), targets.to(dtype))
    return loss / case.passes


def grouped(case: Case, named: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups, frozen parameters included."""
    if not case.groups:
        return [{"params": list(named.values())}]
    biases = [name for name in named if name.endswith("bias")]
    rest = [name for name in named if name not in biases]
    return [
        {"params": [named[name] for name in rest[::2]]},
        {"params": []},
        {"params": [named[name] for name in biases], "lr": 0.03, "weight_decay": 0.0},
        {"params": [named[name] for name in rest[1::2]], "lr": 0.005},
    ]


def schedulers(case: Case, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Stepped after every update."""
    if not case.boost:
        return []
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.9**update)
    return [decay, ObservationBoost(optimizer, milestones=[2, 4], rescale=[decay])]


class Reference:
    """One process that takes every rank's micro-batches, with fp32 masters for a half-precision model."""

    def __init__(self, case: Case, world_size: int) -> None:
        self.case, self.world_size = case, world_size
        self.model = Patchwork().to(case.dtype)
        self.copies = dict(self.model.named_parameters())
        wide = torch.promote_types(case.dtype, torch.float32)
        self.masters = {
            name: copy.detach().to(wide, copy=True).requires_grad_(copy.requires_grad)
            for name, copy in self.copies.items()
        }
        self.optimizer = OPTIMIZERS[case.optimizer](grouped(case, self.masters))
        self.schedulers = schedulers(case, self.optimizer)

    def train(self, updates: range) -> None:
        """Makes some updates."""
        for update in updates:
            self._update(update)

    def _update(self, update: int) -> None:
        case = self.case
        trained = [name for name in self.masters if self.masters[name].requires_grad]
        for name in trained:
            self.masters[name].grad = torch.zeros_like(self.masters[name])
        for rank in range(self.world_size):
            self.model.zero_grad()
            for step in range(case.passes):
                loss_of(self.model, case, update, rank, step).backward()
            for name in trained:
                gradient, total = self.copies[name].grad, self.masters[name].grad
                if gradient is not None:
                    sent = gradient.half() if case.compression == "fp16" else gradient
                    total += sent.to(total.dtype)
        if not case.total:
            for name in trained:
                self.masters[name].grad *= 1 / self.world_size
        if case.scaler and update == OVERFLOW_AT:
            return
        if case.clip:
            norm = torch.nn.utils.clip_grad_norm_(
                [self.masters[name] for name in trained if self.masters[name].numel()],
                case.clip,
                norm_type=case.norm_type,
            )
            assert norm > case.clip
        self.optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        with torch.no_grad():
            for name in trained:
                self.copies[name].copy_(self.masters[name])


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by name, of the parameters that training moves."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.numel()
    }


def selected(names: list[str]) -> Iterator[Case]:
    """The cases, or those with these names, which may be of `OTHER_OPTIMIZERS`."""
    for case in (*CASES, *OTHER_OPTIMIZERS) if names else CASES:
        if not names or case.name in names:
            yield case
