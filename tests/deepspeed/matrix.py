"""The configurations in which ARSG under DeepSpeed is compared with one process, and that process."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.utils.checkpoint
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
OFFLOADED: dict[str, Any] = dict(toy.HYPERPARAMETERS)  # neither foreach nor fused: fused is the default there
OFFLOAD: dict[str, dict[str, Any]] = {
    "": {},
    "cpu": {"offload_optimizer": {"device": "cpu"}},
    "cpu-unpinned": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    "cpu-and-parameters": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    "nvme": {"offload_optimizer": {"device": "nvme", "buffer_count": 5}, "sub_group_size": 10**9},
    "nvme-one-more": {"offload_optimizer": {"device": "nvme", "buffer_count": 6}, "sub_group_size": 10**9},
    "nvme-pipelined": {
        "offload_optimizer": {
            "device": "nvme",
            "buffer_count": 15,
            "pipeline_read": True,
            "pipeline_write": True,
        },
        "sub_group_size": 200_000,
    },
}
for _name in [name for name in OFFLOAD if name.startswith("nvme")]:
    OFFLOAD[f"large-{_name}"] = {**OFFLOAD[_name], "offload_optimizer": {"device": "cpu"}}
# DeepSpeed swaps sub-groups of at least 1 MiB per rank only.
LARGE = (901, 903, 907)
STATE_BYTES = {"bfloat16": 2}
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "": lambda function, inputs: function(inputs),
    "torch": functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False),
    "torch-reentrant": functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True),
    "deepspeed": lambda function, inputs: deepspeed.checkpointing.checkpoint(function, inputs),
}


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        stage: of ZeRO.
        precision: key of `DTYPES`, or "fp16-fp32grads"; "-fp32grads" accumulates the gradient in fp32.
        accumulation: micro-batches per update and rank.
        clip: largest norm of the gradient, 0 for none.
        groups: "one" group of all parameters; "several" groups of different settings, one of them empty and one all
            frozen, of a model with frozen parameters, parameters without gradient and parameters with a gradient in
            some updates, or in some of an update's micro-batches, only.
        overflow: the gradient of one update is infinite: it has to be skipped. The loss scale is dynamic then, and
            grows after every other update.
        offload: key of `OFFLOAD`.
        sent: dtype in which gradients are sent; else that of the model.
        activations: key of `ACTIVATIONS`, how those of the toy model are kept for the backward pass.
        options: further settings of zero_optimization.
        settings: of the optimizer that differ from `SETTINGS`.
    """

    stage: int
    precision: str
    accumulation: int = 1
    clip: float = 0.0
    groups: str = "one"
    overflow: bool = False
    offload: str = ""
    sent: str = ""
    activations: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        parts = [
            f"zero{self.stage}-{self.precision}-accumulate{self.accumulation}-clip{self.clip}-{self.groups}",
            *(["overflow"] if self.overflow else []),
            *([self.offload] if self.offload else []),
            *([f"sent-in-{self.sent}"] if self.sent else []),
            *([f"{self.activations}-activations"] if self.activations else []),
            *(f"{name}={value}" for name, value in (*self.options, *self.settings)),
        ]
        return "-".join(parts)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return DTYPES[self.precision.removesuffix("-fp32grads")]

    @property
    def on_cpu(self) -> "Case":
        """The same, large as on NVMe, offloaded to the CPU."""
        return dataclasses.replace(self, offload=f"large-{self.offload}")

    @property
    def on_nvme(self) -> bool:
        """Whether optimizer state lies on NVMe."""
        return self.offload.startswith("nvme")

    def config(self, directory: Path = Path()) -> dict[str, Any]:
        """For `deepspeed.initialize`; what goes to NVMe goes into the directory."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage == 3:  # several sub-groups; large parameters sharded, small ones kept
            zero |= {"sub_group_size": 1500, "stage3_param_persistence_threshold": 200}
        zero |= {**OFFLOAD[self.offload], **dict(self.options)}
        if self.on_nvme:
            zero["offload_optimizer"] = {**zero["offload_optimizer"], "nvme_path": str(directory / str(self))}
        config: dict[str, Any] = {
            "train_batch_size": toy.BATCH,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clip,
            "optimizer": {
                "type": "ARSG",
                "params": {**(OFFLOADED if self.offload else SETTINGS), **dict(self.settings)},
            },
            "zero_optimization": zero,
            "steps_per_print": 10**6,
        }
        if self.sent:
            config["communication_data_type"] = self.sent
        if self.precision.startswith("bf16"):
            config["bf16"] = {"enabled": True}
        if self.precision.endswith("-fp32grads"):
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        if self.precision.startswith("fp16"):
            # Dynamic where something overflows. The scale stays a power of 2, and so does not change the result.
            scale = (
                {"initial_scale_power": 6, "loss_scale_window": 2, "hysteresis": 1}
                if self.overflow
                else {"loss_scale": FP16_LOSS_SCALE}
            )
            config["fp16"] = {"enabled": True, **scale}
        return config


class Patchwork(nn.Module):
    """The toy model, a frozen layer, and layers used never, in some updates only, or in some micro-batches only."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.used = used_model(case)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.sometimes = (
            nn.Sequential(nn.Linear(5, LARGE[0]), nn.Linear(LARGE[0], LARGE[1]), nn.Linear(LARGE[1], 5))
            if "nvme" in case.offload
            else nn.Linear(5, 5)
        )
        self.early = nn.Linear(5, 5)
        self.late = nn.Linear(5, 5)
        self.unused = nn.Linear(7, 3)
        self.last_step = case.accumulation - 1
        self.run = ACTIVATIONS[case.activations]

    def forward(self, inputs: Tensor, update: int, step: int = 0) -> Tensor:
        outputs: Tensor = self.frozen(self.run(self.used, inputs.requires_grad_()))
        total = outputs
        if update % 2:
            total = total + self.sometimes(outputs)
        if step == 0 and update % 3 != 1:
            total = total + self.early(outputs)
        if step == self.last_step and update % 3 != 2:
            total = total + self.late(outputs)
        return total


class Plain(nn.Module):
    """The toy model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.used = used_model(case)
        self.run = ACTIVATIONS[case.activations]

    def forward(self, inputs: Tensor, update: int, step: int = 0) -> Tensor:
        del update, step
        outputs: Tensor = self.run(self.used, inputs.requires_grad_())
        return outputs


def used_model(case: Case) -> nn.Module:
    """The toy model, large where it has to be swapped."""
    return toy.build_model(*(LARGE if "nvme" in case.offload else ()))


def build_model(case: Case) -> nn.Module:
    """In fp32, the same everywhere."""
    return Plain(case) if case.groups == "one" else Patchwork(case)


def grouped(case: Case, named: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups of all parameters (or what stands for them) of the model, frozen ones too."""
    if case.groups == "one":
        return [{"params": list(named.values())}]
    adam = [name for name in named if name == "used.2.weight"]
    biases = [name for name in named if name.endswith("bias")]
    weights = [name for name in named if name not in adam and name not in biases and name != "frozen.weight"]
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
        {"params": [named["frozen.weight"]], "lr": 0.1},
    ]


def loss_of(model: Any, case: Case, update: int, part: slice) -> Tensor:
    """The mean loss of a part of an update's batch."""
    step = part.start // (toy.BATCH // case.accumulation)
    inputs, targets = toy.batch(update)
    loss = toy.loss_of(model(inputs[part].to(case.dtype), update, step), targets[part])
    return loss * float("inf") if case.overflow and update == OVERFLOW_AT else loss


def micro_batch(case: Case, world_size: int, rank: int, step: int) -> slice:
    """What a rank sees in a micro-step."""
    size = toy.BATCH // (world_size * case.accumulation)
    start = (step * world_size + rank) * size
    return slice(start, start + size)


def single_process_weights(case: Case, world_size: int, at: str = "x") -> dict[str, Tensor]:
    """The oracle: one process, fp32 weights, plain torch and the reference path of the optimizer.

    The weights are those at the observation point "x", or the base iterate "theta".

    In fp32 it takes the gradient of all that the ranks see in a micro-step at once. With a half-precision model it
    keeps fp32 masters, and takes the gradients of the same micro-batches as the ranks, for the roundings inside a
    backward pass depend on them; it adds them up in fp32. A parameter without gradient has gradient zero, as DeepSpeed
    has it: weight decay moves it.
    """
    model = build_model(case).to(case.dtype)
    copies = dict(model.named_parameters())
    masters = {
        name: copy.detach().float().requires_grad_(copy.requires_grad) for name, copy in copies.items()
    }
    optimizer = ARSG(grouped(case, masters), **{**SETTINGS, **dict(case.settings)})
    views = 1 if case.dtype == torch.float32 else world_size
    parts = [
        micro_batch(case, views, rank, step) for step in range(case.accumulation) for rank in range(views)
    ]
    scale = FP16_LOSS_SCALE if case.dtype == torch.float16 else 1.0
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
    """What every rank must hold of m, v, v̂ and slow weights: its share of each shard, padded as DeepSpeed pads.

    Stages 1 and 2 pad every group to a multiple of 2 elements per rank, stage 3 every parameter to the same number of
    elements on every rank.
    """
    size = 0
    for group in grouped(case, dict(build_model(case).named_parameters())):
        numels = [parameter.numel() for parameter in group["params"] if parameter.requires_grad]
        if case.stage == 0:
            held = sum(numels)
        elif case.stage == 3:
            held = sum(-(-numel // world_size) for numel in numels)
        else:
            held = 2 * -(-sum(numels) // (2 * world_size))
        moments = MOMENTS[group.get("preconditioner", "amsgrad")]
        settings = dict(case.settings)
        size += held * (
            moments * STATE_BYTES.get(settings.get("state_dtype"), 4) + 4 * ("lookahead_k" in settings)
        )
    return size
