"""The configurations in which ARSG under DeepSpeed is compared with one process, and that process."""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist import ARSG
from tests.support import toy

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16-fp32grads": torch.bfloat16,
    "fp16": torch.float16,
}
FP16_LOSS_SCALE = 64.0
CLIP = 0.5
OVERFLOW_AT = 3  # the update whose loss is infinite, in cases with an overflow
MOMENTS = {"amsgrad": 3, "adam": 2}
SETTINGS: dict[str, Any] = {**toy.HYPERPARAMETERS, "foreach": False, "fused": False}


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        stage: of ZeRO.
        precision: key of `DTYPES`; "bf16-fp32grads" accumulates the gradient in fp32.
        accumulation: micro-batches per update and rank.
        clip: largest norm of the gradient, 0 for none.
        groups: "one" group of all parameters; "several" groups of different settings, one of them empty, of a model
            with frozen parameters, parameters without gradient and parameters with a gradient in some updates only.
        overflow: the gradient of one update is infinite: it has to be skipped. The loss scale is dynamic then.
    """

    stage: int
    precision: str
    accumulation: int = 1
    clip: float = 0.0
    groups: str = "one"
    overflow: bool = False

    def __str__(self) -> str:
        parts = (
            f"zero{self.stage}-{self.precision}-accumulate{self.accumulation}-clip{self.clip}-{self.groups}"
        )
        return parts + ("-overflow" if self.overflow else "")

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return DTYPES[self.precision]

    @property
    def core(self) -> bool:
        """Whether it is one of the few that every test run can afford."""
        # Not clipped where gradients are accumulated: clipping hides gradients of a wrong size.
        return (self.accumulation, self.clip, self.groups) in ((2, 0.0, "several"), (1, CLIP, "one"))

    def config(self) -> dict[str, Any]:
        """For `deepspeed.initialize`."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:  # several sub-groups; large parameters sharded, small ones kept
            zero |= {"sub_group_size": 1500, "stage3_param_persistence_threshold": 200}
        config: dict[str, Any] = {
            "train_batch_size": toy.BATCH,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "optimizer": {"type": "ARSG", "params": SETTINGS},
            "zero_optimization": zero,
            "steps_per_print": 10**6,
        }
        if self.precision.startswith("bf16"):
            config["bf16"] = {"enabled": True}
        if self.precision == "bf16-fp32grads":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.precision == "fp16":
            # Dynamic where something overflows. The scale stays a power of 2, and so does not change the result.
            scale = {"initial_scale_power": 6} if self.overflow else {"loss_scale": FP16_LOSS_SCALE}
            config["fp16"] = {"enabled": True, **scale}
        return config


def cases(selection: str = "all") -> Iterator[Case]:
    """The configurations: "all", the "core" that every test run can afford, or the "rest"."""
    for case in _all_cases():
        if selection == "all" or case.core == (selection == "core"):
            yield case


def _all_cases() -> Iterator[Case]:
    for stage, precision, accumulation, clip, groups in itertools.product(
        range(4), DTYPES, (1, 2), (0.0, CLIP), ("one", "several")
    ):
        if (stage, precision) != (0, "bf16-fp32grads"):  # DeepSpeed refuses it
            yield Case(stage, precision, accumulation, clip, groups)
    for stage in range(4):
        yield Case(stage, "fp16", accumulation=2, groups="several", overflow=True)


class Patchwork(nn.Module):
    """The toy model, followed by a frozen layer, and layers that are used never or only in every other update."""

    def __init__(self) -> None:
        super().__init__()
        self.used = toy.build_model()
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.sometimes = nn.Linear(5, 5)
        self.unused = nn.Linear(7, 3)

    def forward(self, inputs: Tensor, update: int) -> Tensor:
        outputs: Tensor = self.frozen(self.used(inputs))
        return outputs + self.sometimes(outputs) if update % 2 else outputs


class Plain(nn.Module):
    """The toy model."""

    def __init__(self) -> None:
        super().__init__()
        self.used = toy.build_model()

    def forward(self, inputs: Tensor, update: int) -> Tensor:
        del update
        outputs: Tensor = self.used(inputs)
        return outputs


def build_model(case: Case) -> nn.Module:
    """In fp32, the same everywhere."""
    return Plain() if case.groups == "one" else Patchwork()


def grouped(case: Case, named: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups of all parameters (or what stands for them) of the model, frozen ones too."""
    if case.groups == "one":
        return [{"params": list(named.values())}]
    adam = [name for name in named if name == "used.2.weight"]
    biases = [name for name in named if name.endswith("bias")]
    weights = [name for name in named if name not in adam and name not in biases]
    return [
        {"params": [named[name] for name in weights]},
        {"params": []},
        {
            "params": [named[name] for name in adam],
            "preconditioner": "adam",
            "lr": 0.005,
            "betas": (0.9, 0.99),
            "eps": 0.1,  # smaller, and roundings of a gradient near zero decide the sign of a whole step
            "weight_decay": 0.0,
        },
        {"params": [named[name] for name in biases], "lr": 0.01, "weight_decay": 1e-2, "mu": 0.3},
    ]


def loss_of(model: Any, case: Case, update: int, part: slice) -> Tensor:
    """The mean loss of a part of an update's batch."""
    inputs, targets = toy.batch(update)
    loss = toy.loss_of(model(inputs[part].to(case.dtype), update), targets[part])
    return loss * float("inf") if case.overflow and update == OVERFLOW_AT else loss


def micro_batch(case: Case, world_size: int, rank: int, step: int) -> slice:
    """What a rank sees in a micro-step."""
    size = toy.BATCH // (world_size * case.accumulation)
    start = (step * world_size + rank) * size
    return slice(start, start + size)


def single_process_weights(case: Case, world_size: int, at: str = "x") -> dict[str, Tensor]:
    """The oracle: one process, fp32 weights, plain torch and the reference path of the optimizer.

    The weights are those at the observation point "x", or the base iterate "theta".

    In fp32 it takes the gradient of the whole batch at once. With a half-precision model it keeps fp32 masters, and
    takes the gradients of the same micro-batches as the ranks, for the roundings inside a backward pass depend on them;
    it adds them up in fp32. A parameter without gradient has gradient zero, as DeepSpeed has it: weight decay moves it.
    """
    model = build_model(case).to(case.dtype)
    copies = dict(model.named_parameters())
    masters = {
        name: copy.detach().float().requires_grad_(copy.requires_grad) for name, copy in copies.items()
    }
    optimizer = ARSG(grouped(case, masters), **SETTINGS)
    parts = [slice(0, toy.BATCH)]
    if case.dtype != torch.float32:
        parts = [
            micro_batch(case, world_size, rank, step)
            for step in range(case.accumulation)
            for rank in range(world_size)
        ]
    scale = FP16_LOSS_SCALE if case.precision == "fp16" else 1.0
    trained = [name for name in masters if masters[name].requires_grad]
    for update in range(toy.UPDATES):
        if case.overflow and update == OVERFLOW_AT:
            continue
        for name in trained:
            masters[name].grad = torch.zeros_like(masters[name])
        for part in parts:
            model.zero_grad()
            (loss_of(model, case, update, part) * scale).backward()
            for name in trained:
                gradient, total = copies[name].grad, masters[name].grad
                if gradient is not None and total is not None:
                    total += gradient.float() / (scale * len(parts))
        if case.clip:
            norm = torch.nn.utils.clip_grad_norm_([masters[name] for name in trained], case.clip)
            assert norm > case.clip
        optimizer.step()
        with torch.no_grad():
            for name in trained:
                copies[name].copy_(masters[name])
    with optimizer.base_iterate() if at == "theta" else nullcontext():
        return {name: master.detach().clone() for name, master in masters.items()}


def state_bytes_per_rank(case: Case, world_size: int) -> int:
    """What every rank must hold of m, v, v̂ in fp32: its share of each shard, padded as DeepSpeed pads.

    Stages 1 and 2 pad every group to a multiple of 2 elements per rank, stage 3 every parameter to the same number of
    elements on every rank.
    """
    elements = 0
    for group in grouped(case, dict(build_model(case).named_parameters())):
        numels = [parameter.numel() for parameter in group["params"] if parameter.requires_grad]
        if case.stage == 0:
            held = sum(numels)
        elif case.stage == 3:
            held = sum(-(-numel // world_size) for numel in numels)
        else:
            held = 2 * -(-sum(numels) // (2 * world_size))
        elements += held * MOMENTS[group.get("preconditioner", "amsgrad")]
    return 4 * elements
