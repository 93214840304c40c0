"""Job for one rank: resumes from universal checkpoints that another number of ranks saved; and what it must refuse.

usage: universal.py DIRECTORY SELECTION [--local_rank=N]
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch

import arsg_dist.deepspeed
from arsg_dist.engine import end_process
from tests.deepspeed import checkpoint_cases as checkpoints
from tests.deepspeed import matrix
from tests.deepspeed.jobs.checkpoints import build, differences, schedule_of, snapshot, train
from tests.deepspeed.jobs.common import gathered, job, loading, weights_of
from tests.deepspeed.jobs.matrix import masters
from tests.support import toy

UNIVERSAL = {"checkpoint": {"load_universal": True}}


def main() -> None:
    directory, selection = (a for a in sys.argv[1:] if not a.startswith("--"))
    folder, ranks = Path(directory), os.environ["WORLD_SIZE"]
    with job(folder / f"resumed{ranks}.pt") as results:
        for source, target in checkpoints.transfers(selection):
            results[f"{source} to {target}"] = resume(folder, source, target)
        if selection == "core":
            results["refusals"] = gathered(refusals(folder))


def resume(folder: Path, source: checkpoints.Kept, target: checkpoints.Kept) -> dict[str, Any]:
    """Loads, saves again for comparison, and trains on to the end."""
    engine = build(target, **UNIVERSAL)
    path, client_state = engine.load_checkpoint(str(folder / str(source)))
    result = {
        "epoch": client_state["epoch"],
        "path": path,
        "steps": engine.global_steps,
        "loaded": masters(engine, target.case),
        **schedule_of(engine),
    }
    again = folder / f"again{deepspeed.comm.get_world_size()}" / f"{source} to {target}"
    engine.save_checkpoint(str(again))
    train(engine, target, checkpoints.SAVE_AFTER, toy.UPDATES)
    result["end"] = masters(engine, target.case)
    result["loss scale"] = {
        key: value for key, value in snapshot(engine).items() if key.startswith("loss scale")
    }
    engine.destroy()
    return result


def refusals(folder: Path) -> dict[str, Any]:
    """What each attempt raised or warned of on this rank."""
    said: dict[str, Any] = {}
    engine = build(checkpoints.kept(3, "fp32"), **UNIVERSAL)
    with arsg_dist.deepspeed.restart_lost_maximum():
        said["lost steps"] = loading(engine, folder / "zero3-fp32-lost")
    engine.destroy()
    for config in (checkpoints.kept(1, "fp32"), checkpoints.Kept(matrix.Case(3, "fp32"))):
        lost = str(folder / f"{config}-lost")
        stage = config.case.stage
        engine = build(config, **UNIVERSAL)
        said[f"lost, zero{stage}"] = loading(engine, lost)
        said[f"not converted, zero{stage}"] = loading(engine, folder / str(config), tag="global_step4")
        with warnings.catch_warnings(record=True) as warned, arsg_dist.deepspeed.restart_lost_maximum():
            warnings.simplefilter("always")
            engine.load_checkpoint(lost)
        said[f"warned, zero{stage}"] = [str(w.message) for w in warned if "restarts" in str(w.message)]
        taken = snapshot(engine)
        said[f"restarted at v, zero{stage}"] = all(
            torch.equal(value, taken[key.replace("max_exp", "exp")])
            for key, value in taken.items()
            if "max_exp" in key
        ) and any("max_exp" in key for key in taken)
        train(engine, config, checkpoints.SAVE_AFTER, toy.UPDATES)
        engine.destroy()
        engine = build(config)
        said[f"other ranks, zero{stage}"] = loading(engine, folder / str(config))
        said[f"converted, zero{stage}"] = loading(engine, folder / str(config), tag="universal")
        said[f"missing, zero{stage}"] = loading(engine, folder, tag="nowhere")
        train(engine, config, 0, 1)
        engine.save_checkpoint(str(folder / "mine"), tag=f"zero{stage}")
        engine.destroy()
    for stage, other in ((1, 3), (3, 1), (1, 0), (0, 1)):
        engine = build(checkpoints.kept(stage, "fp32"))
        if stage == 0:
            train(engine, checkpoints.kept(0, "fp32"), 0, 1)
            engine.save_checkpoint(str(folder / "mine"), tag="zero0")
        if other == 0:
            source = build(checkpoints.kept(0, "fp32"))
            source.save_checkpoint(str(folder / "mine"), tag="zero0")
            source.destroy()
        said[f"zero{other} into zero{stage}"] = loading(engine, folder / "mine", tag=f"zero{other}")
        engine.destroy()
    said |= without_state(folder)
    said |= other_optimizer(folder)
    said |= other_model(folder)
    return said


def without_state(folder: Path) -> dict[str, Any]:
    """Checkpoints as DeepSpeed writes them with the optimizer on NVMe: stepped, and without the optimizer's state."""
    said: dict[str, Any] = {}
    path = folder / "stateless"
    for stage in (0, 1, 3):
        config = checkpoints.kept(stage, "fp32")
        engine = build(config)
        engine.save_checkpoint(str(path), tag=f"new{stage}")
        new = snapshot(engine)
        train(engine, config, 0, 1)
        accepted = loading(engine, path, tag=f"new{stage}")
        said[f"new, zero{stage}"] = accepted, differences(new, snapshot(engine))
        train(engine, config, 0, 1)
        engine.basic_optimizer.state.clear()
        engine.save_checkpoint(str(path), tag=f"zero{stage}")
        saved = masters(engine, config.case)
        said[f"stateless, zero{stage}"] = loading(engine, path, tag=f"zero{stage}")
        train(engine, config, 1, 2)
        accepted = loading(engine, path, tag=f"zero{stage}", load_module_only=True)
        said[f"stateless, weights, zero{stage}"] = accepted, differences(saved, masters(engine, config.case))
        engine.destroy()
    engine = build(checkpoints.kept(2, "fp32"), **UNIVERSAL)
    said["stateless, universal"] = loading(engine, folder / "zero1-fp32-stateless")
    engine.destroy()
    return said


def other_optimizer(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for stage in (0, 1, 3):
        config = checkpoints.kept(stage, "fp32").config()
        model = checkpoints.Everything()
        adam, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=config | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
        )
        inputs, targets = toy.batch(0)
        adam.backward(toy.loss_of(adam(inputs, 1), targets))
        adam.step()
        adam.save_checkpoint(str(folder / "adam"), tag=f"zero{stage}")
        trained = weights_of(adam.module)
        adam.destroy()
        engine = build(checkpoints.kept(stage, "fp32"))
        said[f"Adam's, zero{stage}"] = loading(engine, folder / "adam", tag=f"zero{stage}")
        started = weights_of(engine.module)
        engine.load_checkpoint(str(folder / "adam"), tag=f"zero{stage}", load_module_only=True)
        said[f"Adam's weights, zero{stage}"] = (
            differences(trained, weights_of(engine.module)),
            differences(started, trained) != [],
        )
        engine.destroy()
    return said


def other_model(folder: Path) -> dict[str, Any]:
    config = checkpoints.kept(2, "fp32").config(**UNIVERSAL)
    said = {}
    for name, change in {
        "another shape": lambda model: setattr(model, "unused", torch.nn.Linear(7, 4)),
        "another parameter": lambda model: setattr(model, "added", torch.nn.Linear(2, 2)),
        "another buffer": lambda model: model.register_buffer("added", torch.zeros(2)),
        "another group": lambda model: None,
    }.items():
        model = checkpoints.Everything()
        change(model)
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
        said[name] = loading(engine, folder / "zero1-fp32")
        engine.destroy()
    return said


if __name__ == "__main__":
    main()
    end_process(0)
