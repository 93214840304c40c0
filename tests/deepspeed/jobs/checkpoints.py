"""Job for one rank: saves checkpoints of many configurations and resumes from them on the same ranks.

For each configuration: an uninterrupted run that saves on its way; the same engine put back to the checkpoint; a fresh
engine that loads it. All three must end with the same bits.

usage: checkpoints.py DIRECTORY SELECTION [--local_rank=N]
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

import arsg_dist.deepspeed  # makes "type": "ARSG" known
from arsg_dist.deepspeed.checkpoint.zero_state import shards_of
from arsg_dist.engine import end_process
from tests.deepspeed import checkpoint_cases as checkpoints
from tests.deepspeed import matrix
from tests.deepspeed.jobs.common import gathered, job, weights_of
from tests.deepspeed.jobs.matrix import masters
from tests.support import toy


def main() -> None:
    directory, selection = (a for a in sys.argv[1:] if not a.startswith("--"))
    folder = Path(directory)
    with job(folder / "saved.pt") as results:
        results |= {str(case): save_and_resume(case, folder) for case in checkpoints.kept_cases(selection)}


def save_and_resume(config: checkpoints.Kept, directory: Path) -> dict[str, Any]:
    folder = str(directory / str(config))
    engine = build(config)
    train(engine, config, 0, checkpoints.SAVE_AFTER)
    at_save, result = snapshot(engine), {"saved": masters(engine, config.case), **schedule_of(engine)}
    engine.save_checkpoint(folder, client_state={"epoch": 7})
    for point in ("x", "theta"):
        arsg_dist.deepspeed.export(engine, directory / f"{config}-{point}.safetensors", at=point)
    with arsg_dist.deepspeed.base_iterate(engine):
        result["theta"] = weights_of(engine.module)
    train(engine, config, checkpoints.SAVE_AFTER, toy.UPDATES)
    at_end, result["end"] = snapshot(engine), masters(engine, config.case)
    for how in ("stepped", "fresh"):
        if how == "fresh":
            engine.destroy()
            engine = build(config)
        path, client_state = engine.load_checkpoint(folder)
        result[how] = {
            "loaded": path is not None and client_state["epoch"] == 7 and "arsg" not in client_state,
            "differs after loading": differences(at_save, snapshot(engine)),
            "fragments": fragments_are_linked(engine),
        }
        train(engine, config, checkpoints.SAVE_AFTER, toy.UPDATES)
        result[how]["differs at the end"] = differences(at_end, snapshot(engine))
    engine.destroy()
    return result | {"ranks": gathered({how: result[how] for how in ("stepped", "fresh")})}


def build(config: checkpoints.Kept, **sections: Any) -> Any:
    model = checkpoints.Everything()
    parameters = matrix.grouped(config.case, dict(model.named_parameters()))
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config.config(**sections))[0]


def train(engine: Any, config: checkpoints.Kept, first: int, last: int) -> None:
    part = checkpoints.micro_batch(deepspeed.comm.get_world_size(), deepspeed.comm.get_rank())
    for update in range(first, last):
        if not config.schedule:
            checkpoints.scheduled(engine.basic_optimizer, update)
        engine.backward(checkpoints.loss_of(engine, config, update, part))
        engine.step()


def schedule_of(engine: Any) -> dict[str, Any]:
    """The state of the schedule, and what it has made of the groups."""
    scheduler = engine.lr_scheduler
    groups = engine.basic_optimizer.param_groups
    return {
        "schedule": scheduler.state_dict() if scheduler else None,
        "settings": [[group["lr"], group["mu"], *group["betas"]] for group in groups],
    }


def snapshot(engine: Any) -> dict[str, Any]:
    """Everything that this rank's further training depends on."""
    taken: dict[str, Any] = {}
    for index, shard in enumerate(shards_of(engine)):
        taken[f"{index} master"], taken[f"{index} copy"] = shard.master.clone(), shard.copy.clone()
        for key, value in shard.state.items():
            taken[f"{index} {key}"] = value.clone() if isinstance(value, Tensor) else value
    for index, group in enumerate(engine.basic_optimizer.param_groups):
        taken |= {f"group {index} {key}": value for key, value in group.items() if key != "params"}
    for name, buffer in engine.module.named_buffers():
        taken[f"buffer {name}"] = buffer.clone()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            taken[f"frozen {name}"] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    scaler = getattr(engine.optimizer, "loss_scale_config", None) or getattr(
        engine.optimizer, "loss_scaler", None
    )
    for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
        taken[f"loss scale {key}"] = getattr(scaler, key, None)
    taken["steps"] = engine.global_steps, engine.skipped_steps, engine.global_samples
    return taken | schedule_of(engine)


def differences(some: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same, bit by bit."""
    differing = sorted(some.keys() ^ other.keys())
    for key in some.keys() & other.keys():
        a, b = some[key], other[key]
        same = (
            a.dtype == b.dtype
            and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
            if isinstance(a, Tensor)
            else a == b
        )
        if not same:
            differing.append(key)
    return differing


def fragments_are_linked(engine: Any) -> bool:
    """Whether DeepSpeed's view of the optimizer state, for tools that look at it, is there after loading."""
    linked = [
        p._hp_mapping.optim_fragment for p in engine.module.parameters() if getattr(p, "_hp_mapping", None)
    ]
    return all(fragment and "exp_avg" in fragment for fragment in linked)


if __name__ == "__main__":
    main()
    end_process(0)
