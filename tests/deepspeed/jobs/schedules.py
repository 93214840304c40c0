"""Job for one rank: trains under every schedule of a ZeRO stage, and once more from a checkpoint in the middle.

usage: schedules.py OUTPUT_DIRECTORY STAGE [--local_rank=N]
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch

import arsg_dist.deepspeed
from arsg_dist.engine import end_process
from tests.deepspeed import scheduled as schedules
from tests.deepspeed.jobs.common import agreed, job, refusal, weights_of
from tests.support import toy

ACCUMULATION = 2


def main() -> None:
    directory, given = (a for a in sys.argv[1:] if not a.startswith("--"))
    output, stage = Path(directory), int(given)
    with job(output / "results.pt") as results:
        for name, case in schedules.CASES.items():
            if stage in case.stages:
                results[name] = train(case, stage, output / name)
        if stage == 1:
            results["refusals"] = refusals()


def begin(
    stage: int, section: dict[str, Any] | None, client: Any = None, fp16: bool = False, **optimizer: Any
) -> tuple[Any, Any]:
    config: dict[str, Any] = {
        "train_batch_size": toy.BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "ARSG", "params": schedules.SETTINGS, **optimizer},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**6,
    }
    if section is not None:
        config["scheduler"] = section
    if fp16:
        config["fp16"] = {"enabled": True, "initial_scale_power": 6}
    model = toy.build_model()
    groups = schedules.groups_of(dict(model.named_parameters()))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups, config=config, lr_scheduler=client
    )
    return engine, model


def train(case: schedules.Case, stage: int, checkpoint: Path) -> dict[str, Any]:
    """The whole training, and its second half after a checkpoint was loaded into a new engine."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine, model = begin(stage, case.section, case.client, case.fp16)
        used = updates(engine, case, 0, schedules.SAVE_AT)
        engine.save_checkpoint(str(checkpoint), tag="saved")
        with arsg_dist.deepspeed.base_iterate(engine):
            pass  # an evaluation; boosts must go on listening afterwards
        used += updates(engine, case, schedules.SAVE_AT, schedules.UPDATES)
        result = {"used": used, "after": schedules.settings_of(engine.basic_optimizer)}
        result["weights"] = weights_of(model)
        engine.destroy()
        engine, model = begin(stage, case.section, case.client, case.fp16)
        engine.load_checkpoint(str(checkpoint), tag="saved")
        result["used, resumed"] = updates(engine, case, schedules.SAVE_AT, schedules.UPDATES)
        result["weights, resumed"] = weights_of(model)
        engine.destroy()
    result["warnings"] = [
        str(w.message) for w in warned if "arsg_dist" in w.filename or "lr_sched" in w.filename
    ]
    return result


def updates(engine: Any, case: schedules.Case, first: int, last: int) -> list[Any]:
    """Trains, and returns the settings every update used."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    size = toy.BATCH // (world_size * ACCUMULATION)
    dtype = torch.float16 if case.fp16 else torch.float32
    used = []
    for update in range(first, last):
        used.append(schedules.settings_of(engine.basic_optimizer))
        for step in range(ACCUMULATION):
            start = (step * world_size + rank) * size
            part = slice(start, start + size)
            engine.backward(schedules.loss_of(engine, update, part, dtype, case.fp16))
            engine.step()
    return used


def refusals() -> dict[str, Any]:
    """How schedules that cannot work end, the same on every rank."""

    def initialize(kind: str, **params: Any) -> str | None:
        return agreed(refusal(lambda: begin(1, {"type": kind, "params": params})))

    def metric() -> None:
        engine, _ = begin(1, {"type": "ReduceLROnPlateau", "params": {"patience": 0}})
        for given in ({"metrics": 1.0}, {"metrics": 1.0}, None):
            for _ in range(ACCUMULATION):
                engine.backward(schedules.loss_of(engine, 0, slice(None), torch.float32, False))
                engine.step(lr_kwargs=given)

    return {
        "one lr for two": initialize("WarmupLR", warmup_max_lr=0.02),
        "default lr": initialize("WarmupDecayLR", total_num_steps=10),
        "momentum": initialize("OneCycle", cycle_min_lr=0.1, cycle_max_lr=[0.2, 0.1]),
        "misspelt": initialize("StepLR", stepsize=3),
        "missing": initialize("StepLR"),
        "unfilled": initialize("WarmupLR", warmup_num_steps="auto"),
        "metric": agreed(refusal(metric)),
    }


if __name__ == "__main__":
    main()
    end_process(0)
