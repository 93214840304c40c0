"""Optimizers that every engine trains with, from their names and settings: cases of `followed`; a new one is a row."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from arsg_dist.engine import Engine
from arsg_dist.optim.by_name import make_optimizer
from tests.support import toy
from tests.support.checkpoint_matrix import FAMILIES, STAGES, build_model, engine_around
from tests.support.checkpoint_matrix import train as train

REMOTE = "RemoteObservation"


@dataclass(frozen=True)
class Case:
    """An optimizer.

    Attributes:
        type: as in a recipe or a DeepSpeed config.
        params: of it.
        second: settings of the second group, the biases.
        engines: those that can train with it.
        matrices: train matrices only, each as a whole.
        relative: largest difference from one process, as a share of the movement.
    """

    type: str
    params: dict[str, Any]
    second: dict[str, Any]
    engines: tuple[str, ...]
    matrices: bool = False
    relative: float = 2e-5


ALL = tuple(name for names in FAMILIES.values() for name in names)
LOCAL = ("single", "ddp", "ddp-divided", "fsdp", "horovod", "horovod-sharded")
REMOTELY = {"remote_mu": 0.2, "remote_beta1": 0.9}
THEIR_SECOND = {"lr": 0.002, "weight_decay": 0.0, "remote_mu": 0.4, "remote_beta1": 0.8}
ARSG_SECOND = {"lr": 0.03, "mu": 0.2, "weight_decay": 0.0}
ADAM = {
    "lr": 0.02,
    "betas": [0.9, 0.95],
    "eps": 1e-3,
    "mu": 0.2,
    "weight_decay": 0.1,
    "preconditioner": "adam",
}

CASES = {
    # Around each element-wise method that DeepSpeed's JSON can name.
    "remote adamw": Case(
        REMOTE,
        {"inner": "AdamW", "lr": 0.005, "betas": [0.0, 0.9], "eps": 1e-2, "weight_decay": 0.1, **REMOTELY},
        THEIR_SECOND,
        ALL,
    ),
    "remote adam": Case(
        REMOTE, {"inner": "Adam", "lr": 0.005, "eps": 1e-2, **REMOTELY}, THEIR_SECOND, ("ddp", "zero2")
    ),
    "remote sgd": Case(
        REMOTE,
        {"inner": "SGD", "lr": 4e-3, "remote_cautious_weight_decay": 0.5, **REMOTELY},
        {"lr": 2e-3, "remote_cautious_weight_decay": 0.0, "remote_mu": 0.4},
        (*LOCAL, "zero1"),
    ),
    "remote lion": Case(
        REMOTE,
        {"inner": "Lion", "lr": 1e-3, "weight_decay": 0.1, **REMOTELY},
        THEIR_SECOND,
        (*LOCAL, "zero3"),
        relative=1e-3,  # a sign that differs by a rounding is a whole step
    ),
    "remote arsg": Case(
        REMOTE,
        {"inner": "ARSG", **ADAM, "betas": [0.0, 0.9], "mu": 0.0, "lr": 0.005, **REMOTELY},
        {**THEIR_SECOND, "bias_correction": "none"},
        (*LOCAL, "zero0", "zero2", "zero3"),
    ),
    # A matrix method, where an engine holds whole tensors or the method knows of shards.
    "remote muon": Case(
        REMOTE,
        {"inner": "Muon", "lr": 0.01, "momentum": 0.5, "weight_decay": 0.1, **REMOTELY},
        {},
        ("ddp", "fsdp", "horovod", "zero0"),
        matrices=True,
        relative=8e-2,  # it computes in bfloat16, also what ranks add up
    ),
    # Settings of ARSG beside those that the other tests of engines have.
    "bias_correction": Case(
        "ARSG", {**ADAM, "bias_correction": "second"}, {**ARSG_SECOND, "bias_correction": "none"}, ALL
    ),
    "cautious_weight_decay": Case(
        "ARSG",
        {**ADAM, "decoupled_weight_decay": True, "cautious_weight_decay": True},
        {**ARSG_SECOND, "weight_decay": 0.2, "cautious_weight_decay": False},
        (*LOCAL, "zero1", "zero3"),
    ),
    "precondition_first": Case(
        "ARSG",
        {**ADAM, "precondition_first": True},
        {**ARSG_SECOND, "preconditioner": "amsgrad"},
        (*LOCAL, "zero0", "zero2"),
    ),
}


def groups_of(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    for name, parameter in model.named_parameters():
        if case.matrices and parameter.dim() == 1:
            parameter.requires_grad_(False)
        assert name
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if p.dim() > 1]}]
    others = [p for p in trained if p.dim() == 1]
    return [*groups, {"params": others, **case.second}] if others else groups


def engines_of(family: str, label: str) -> list[str]:
    return [name for name in FAMILIES[family] if name in CASES[label].engines]


def build(name: str, label: str, communicator: Any) -> Engine:
    """DeepSpeed's from a JSON config."""
    case, model = CASES[label], build_model()
    if name in STAGES:
        from arsg_dist.deepspeed import DeepSpeedEngine

        config = {
            "train_batch_size": toy.BATCH,
            "gradient_clipping": 0.0,
            "optimizer": {"type": case.type, "params": case.params},
            "zero_optimization": {
                "stage": int(name[-1]),
                "stage3_param_persistence_threshold": 0,
                "reduce_bucket_size": 1000,
            },
        }
        return DeepSpeedEngine(model, config, communicator, parameter_groups=groups_of(case, model))
    return engine_around(
        name,
        model,
        lambda module: groups_of(case, module),
        lambda groups: make_optimizer(case.type, case.params, groups),
        communicator,
    )


def weights(engine: Engine) -> dict[str, Tensor]:
    """The trained ones, at x or, inside `base_iterate`, at θ."""
    wanted = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    wanted = {name.removeprefix("module.") for name in wanted}
    return {name: tensor for name, tensor in engine.whole_weights().items() if name in wanted}


def seen(engine: Engine) -> dict[str, Any]:
    with engine.base_iterate():
        return {"theta": weights(engine)}


def started_from(label: str) -> dict[str, Tensor]:
    model = build_model()
    groups_of(CASES[label], model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
