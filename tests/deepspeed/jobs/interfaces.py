"""Job for one rank: reaches ARSG in every way DeepSpeed offers, and its state through DeepSpeed's own functions.

usage: interfaces.py OUTPUT_DIRECTORY [--local_rank=N]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

import arsg_dist.deepspeed
from arsg_dist import ARSG
from arsg_dist.engine import end_process
from tests.deepspeed.jobs.common import agreed, gathered, job, refusal, weights_of
from tests.support import toy

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SET_AFTER = 3  # updates, after which the weights and moments are doubled, and then the next gradient


ROUND_ROBIN = {"round_robin_gradients": True}
# stage and further settings of zero_optimization
STATES: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"zero{stage}": (stage, {}) for stage in (1, 2, 3)},
    **{f"zero{stage}, round robin": (stage, ROUND_ROBIN) for stage in (1, 2)},
    "zero2, offloaded, round robin": (2, {**ROUND_ROBIN, "offload_optimizer": {"device": "cpu"}}),
}


def build_model() -> nn.Module:
    """With four tensors in a group, which round_robin_gradients on 3 ranks puts in another order."""
    return toy.build_model(101, 67, 41)


def groups_of(named: dict[str, Any]) -> list[dict[str, Any]]:
    """Two groups with settings of their own."""
    return [
        {"params": [value for name, value in named.items() if name.endswith("weight")], "mu": 0.2},
        {"params": [value for name, value in named.items() if name.endswith("bias")], "lr": 0.01},
    ]


def config(stage: int, **optimizer: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"sub_group_size": 1500, "stage3_param_persistence_threshold": 200}
    return {
        "train_batch_size": toy.BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "steps_per_print": 10**6,
        **optimizer,
    }


# The last three differ in what is handed to DeepSpeed, which the stage does not change.
WAYS = {
    "json": (0, 1, 2, 3),
    "initialize": (0, 1, 2, 3),
    "initialize from args": (1,),
    "initialize with a callable": (1,),
    "callable": (1,),
}
SECTION = {"optimizer": {"type": "ARSG", "params": toy.HYPERPARAMETERS}}


def main() -> None:
    output = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    with job(output / "results.pt") as results:
        results |= {"torch has ARSG": hasattr(torch.optim, "ARSG")}
        for way, stages in WAYS.items():
            for stage in stages:
                results[f"{way}, zero{stage}"] = trained(way, stage, output)
        for name, (stage, options) in STATES.items():
            results[f"state, {name}"] = state_access(stage, options, output / name)
        results["gathered"] = gathered_beside_a_small_one()
        results["refusals"] = refusals()


def begun(way: str, stage: int, output: Path, **zero: Any) -> tuple[Any, nn.Module]:
    model = build_model()
    groups = groups_of(dict(model.named_parameters()))

    def build(parameters: Any) -> ARSG:
        return ARSG(parameters, **toy.HYPERPARAMETERS)

    if way == "json":
        given = config(stage, **SECTION)
        given["zero_optimization"] |= zero
        result = deepspeed.initialize(model=model, model_parameters=groups, config=given)
    elif way == "initialize":
        given = config(stage, **SECTION)
        result = arsg_dist.deepspeed.initialize(model=model, model_parameters=groups, config=given)
        assert given == config(stage, **SECTION), "the caller's config was changed"
    elif way == "initialize from args":
        path = output / f"zero{stage}.json"
        path.write_text(json.dumps(config(stage, **SECTION)))
        deepspeed.comm.barrier()
        args = argparse.Namespace(deepspeed_config=str(path), local_rank=-1)
        result = arsg_dist.deepspeed.initialize(args, model, model_parameters=groups)
        assert args.deepspeed_config == str(path)
        assert args.local_rank >= 0
    elif way == "initialize with a callable":
        result = arsg_dist.deepspeed.initialize(
            model=model, optimizer=build, model_parameters=groups, config=config(stage)
        )
    else:
        result = deepspeed.initialize(
            model=model, optimizer=build, model_parameters=groups, config=config(stage)
        )
    engine, optimizer, loader, scheduler = result
    assert optimizer is engine.optimizer
    assert loader is scheduler is None
    assert type(engine.basic_optimizer) is ARSG
    return engine, model


def backward(engine: Any, update: int) -> None:
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    size = toy.BATCH // world_size
    part = slice(rank * size, (rank + 1) * size)
    inputs, targets = toy.batch(update)
    engine.backward(toy.loss_of(engine(inputs[part]), targets[part]))


def trained(way: str, stage: int, output: Path) -> dict[str, Tensor]:
    engine, model = begun(way, stage, output)
    for update in range(toy.UPDATES):
        backward(engine, update)
        engine.step()
    weights = weights_of(model)
    engine.destroy()
    return weights


def state_access(stage: int, options: dict[str, Any], output: Path) -> dict[str, Any]:
    """What safe_get_full_* return at several times, with what safe_set_full_* changed in between."""
    engine, model = begun("json", stage, output, **options)
    named = dict(model.named_parameters())
    early = refusal(lambda: safe_get_full_optimizer_state(named["2.bias"], "exp_avg"))
    seen: dict[str, Any] = {"before the first update": agreed(early)}
    for update in range(toy.UPDATES):
        backward(engine, update)
        if update == SET_AFTER:
            seen["gradients"] = {name: safe_get_full_grad(p).clone() for name, p in named.items()}
        if update == SET_AFTER + 1:
            for parameter in named.values():
                safe_set_full_grad(parameter, 2 * safe_get_full_grad(parameter))
        engine.step()
        if update == SET_AFTER:
            seen["state"] = read(named)
            double(named)
            seen["state, doubled"] = read(named)
    seen["state at the end"] = read(named)
    seen["unknown"] = agreed(refusal(lambda: safe_get_full_optimizer_state(named["2.bias"], "momentum")))
    seen["unknown, set"] = agreed(
        refusal(lambda: safe_set_full_optimizer_state(named["2.bias"], named["2.bias"], "momentum"))
    )
    seen["state after refusals"] = read(named)
    engine.save_checkpoint(str(output), tag="saved")
    engine.load_checkpoint(str(output), tag="saved")
    seen["state, reloaded"] = read(named)
    engine.destroy()
    return seen


class Uneven(nn.Module):
    """Has a weight whose gathering takes long, and one that is there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.arange(6e6))
        self.small = nn.Parameter(torch.ones(3))


def gathered_beside_a_small_one() -> list[bool]:
    """Whether every rank finds the weights whole, read together at stage 3."""
    model, right = Uneven(), Uneven()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(3, **SECTION)
    )
    weights = weights_of(model)
    engine.destroy()
    return gathered(all(torch.equal(weights[name], value) for name, value in right.named_parameters()))


def read(named: dict[str, Any]) -> dict[str, dict[str, Tensor | None]]:
    """Weights in fp32 and moments, by name of the parameter; collective calls."""
    return {
        "weights": {name: cloned(safe_get_full_fp32_param(p)) for name, p in named.items()},
        **{
            key: {name: cloned(safe_get_full_optimizer_state(p, key)) for name, p in named.items()}
            for key in MOMENTS
        },
    }


def cloned(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


def double(named: dict[str, Any]) -> None:
    for parameter in named.values():
        safe_set_full_fp32_param(parameter, 2 * safe_get_full_fp32_param(parameter))
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, 2 * safe_get_full_optimizer_state(parameter, key), key)


def refusals() -> dict[str, Any]:
    """How bad input ends, the same on every rank."""
    arsg = {"type": "ARSG", "params": {"lr": 0.1}}

    def attempt(**arguments: Any) -> str | None:
        model = toy.build_model()
        return refusal(lambda: arsg_dist.deepspeed.initialize(model=model, **arguments))

    def plain(**section: Any) -> str | None:
        model = toy.build_model()
        return refusal(
            lambda: deepspeed.initialize(
                model=model, model_parameters=model.parameters(), config=config(1, **section)
            )
        )

    one = torch.nn.Parameter(torch.ones(1))
    zenflow = config(2)
    zenflow["zero_optimization"]["zenflow"] = {"topk_ratio": 0.1}
    model = toy.build_model()
    found = {
        "no config": attempt(),
        "two configs": attempt(config=config(1), config_params=config(1)),
        "no optimizer": attempt(config=config(1)),
        "another optimizer": attempt(config=config(1, optimizer={"type": "AdamW"})),
        "two optimizers": attempt(config=config(1, optimizer=arsg), optimizer=ARSG),
        "Adam": attempt(config=config(1), optimizer=torch.optim.Adam(toy.build_model().parameters())),
        "class Adam": attempt(config=config(1), optimizer=torch.optim.Adam),
        "maker of Adam": attempt(
            config=config(1),
            optimizer=lambda parameters: torch.optim.Adam(parameters),
            model_parameters=[one],
        ),
        "no optimizer at all": attempt(config=config(1), optimizer=3),
        "auto": attempt(config=config(1, optimizer={"type": "ARSG", "params": {"lr": "auto", "mu": 0.1}})),
        "auto, plain": plain(optimizer={"type": "ARSG", "params": {"eps": "auto"}}),
        "auto type, plain": plain(optimizer={"type": "auto", "params": "auto"}),
        "zenflow, by a callable": refusal(
            lambda: deepspeed.initialize(
                model=model,
                optimizer=lambda parameters: ARSG(parameters),
                model_parameters=list(model.parameters()),
                config=zenflow,
            )
        ),
    }
    return {name: agreed(text) for name, text in found.items()}


if __name__ == "__main__":
    main()
    end_process(0)
