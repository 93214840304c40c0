"""The configurations whose checkpoints are tested, and a model with everything that a checkpoint has to keep."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.deepspeed import matrix
from tests.support import toy
from tests.support.turns import part_of

SAVE_AFTER = 4  # updates, of toy.UPDATES; after the overflow


class Everything(nn.Module):
    """The patchwork model with tied parameters and with buffers, persistent and not."""

    def __init__(self) -> None:
        super().__init__()
        patchwork = matrix.Patchwork(matrix.Case(1, "fp32"))
        self.used, self.frozen = patchwork.used, patchwork.frozen
        self.sometimes, self.unused = patchwork.sometimes, patchwork.unused
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, inputs: Tensor, update: int, step: int = 0) -> Tensor:
        del step
        if self.training:
            self.seen += 1
            self.forwards += 1
        outputs: Tensor = self.frozen(self.used(inputs))
        outputs = self.second(torch.tanh(self.first(outputs)))
        return outputs + self.sometimes(outputs) if update % 2 else outputs


@dataclass(frozen=True)
class Kept:
    """A configuration of the matrix with several groups.

    Attributes:
        case: of the matrix.
        offload: optimizer state on the CPU.
        extra: settings of the optimizer beside the matrix's.
        schedule: with `SCHEDULE` in the config; else `scheduled` sets lr.
    """

    case: matrix.Case
    offload: bool = False
    extra: tuple[tuple[str, Any], ...] = ()
    schedule: bool = False

    def __str__(self) -> str:
        parts = [f"zero{self.case.stage}-{self.case.precision}", *["one"] * (self.case.groups == "one")]
        options = [name for name, _ in (*self.case.options, *self.extra)]
        parts += [*["offload"] * self.offload, *[self.case.offload] * bool(self.case.offload)]
        return "-".join([*parts, *["schedule"] * self.schedule, *options])

    def config(self, **sections: Any) -> dict[str, Any]:
        """For `deepspeed.initialize`."""
        config = self.case.config()
        settings = matrix.OFFLOADED if self.offload or self.case.offload else matrix.SETTINGS
        config["optimizer"] = {"type": "ARSG", "params": {**settings, **dict(self.extra)}}
        if self.schedule:
            config["scheduler"] = SCHEDULE
        if self.offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        return config | sections


def kept(stage: int, precision: str, **more: Any) -> Kept:
    """With an overflow in fp16, so that the loss scale has a history."""
    return Kept(matrix.Case(stage, precision, groups="several", overflow=precision == "fp16"), **more)


# One boost before the checkpoint and one after it, while lr warms up.
SCHEDULE: dict[str, Any] = {
    "type": "ChainedScheduler",
    "params": {
        "schedulers": [
            {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_type": "linear"}},
            {"type": "ObservationBoost", "params": {"milestones": [2, 5], "factor": 1.5}},
        ]
    },
}
LOOKAHEAD = (("lookahead_k", 3), ("betas", [0.9, 0.99]))
HALF_STATE = (("state_dtype", "bfloat16"),)


def kept_cases(selection: str) -> Iterator[Kept]:
    """Every stage and precision, offload, lookahead, bf16 state, a schedule: the "core", a "few", or a part of all."""
    cases = [
        kept(stage, precision)
        for stage, precision in itertools.product(range(4), matrix.DTYPES)
        if (stage, precision) != (0, "bf16-fp32grads")
    ]
    cases += [kept(stage, "fp32", offload=True) for stage in (1, 2, 3)]
    cases += [kept(stage, "fp32", extra=LOOKAHEAD) for stage in (0, 1, 3)]
    cases += [kept(stage, "bf16", extra=HALF_STATE) for stage in (2, 3)]
    cases.append(Kept(matrix.Case(3, "fp32")))
    cases.append(Kept(matrix.Case(3, "fp32", groups="several", offload="cpu-and-parameters")))
    cases.append(kept(2, "bf16", schedule=True))
    cases.append(Kept(matrix.Case(2, "fp32", groups="several", options=(("round_robin_gradients", True),))))
    core = {
        "zero0-bf16",
        "zero1-bf16-fp32grads",
        "zero1-fp32",
        "zero2-bf16-schedule",
        "zero2-fp16",
        "zero3-fp32",
        "zero3-fp32-one",
        "zero3-bf16",
        "zero3-fp32-lookahead_k-betas",
    }
    few = {"zero1-bf16-fp32grads", "zero3-bf16"}
    named = {"core": core, "few": few}
    chosen = [case for case in cases if str(case) in named.get(selection, ())]
    yield from chosen if selection in named else part_of(cases, selection)


def transfers(selection: str) -> Iterator[tuple[Kept, Kept]]:
    """Universal checkpoints: from which configuration to which; in the core each to one other stage."""
    for number, source in enumerate(kept_cases(selection)):
        if source.case.groups == "one":
            continue
        precision = source.case.precision
        for stage in range(4):
            if selection in ("core", "few") and (stage - source.case.stage) % 4 != 1 + number % 2:
                continue
            target = "bf16" if (stage, precision) == (0, "bf16-fp32grads") else precision
            settings = {"extra": source.extra, "schedule": source.schedule}
            yield source, kept(stage, target, offload=source.offload and stage > 0, **settings)
        if selection != "few" and source in (kept(3, "bf16"), kept(2, "fp16")):
            yield source, kept(1, "fp32")


def scheduled(optimizer: Any, update: int) -> None:
    """A schedule of its own for each group, so that no two have the settings of the config."""
    for index, group in enumerate(optimizer.param_groups):
        group["lr"] = (0.02, 0.005, 0.01, 0.1)[index] * (1 + 0.1 * index - 0.05 * update)


def loss_of(model: Any, config: Kept, update: int, part: slice) -> Tensor:
    """As the matrix's."""
    return matrix.loss_of(model, config.case, update, part)


def micro_batch(world_size: int, rank: int) -> slice:
    """A rank's part of an update's batch."""
    size = toy.BATCH // world_size
    return slice(rank * size, (rank + 1) * size)
