"""Job for one rank: updates with a setting that is another one on the last rank; writes what each case raised.

usage: settings_job.py OUTPUT ENGINE...
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist import ARSG
from arsg_dist.engine import Engine, JobError, discover_ranks, end_process

CHANGED = {"lr": 0.25, "betas": (0.5, 0.99), "mu": 0.2, "weight_decay": 0.1, "eps": 1e-3}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def groups(module: Any) -> list[dict[str, Any]]:
    return [
        {"params": list(module[0].parameters())},
        {"params": list(module[1].parameters()), "betas": (0.9, 0.99)},
    ]


def deepspeed_engine(communicator: Any, stage: int) -> Engine:
    from arsg_dist.deepspeed import DeepSpeedEngine

    module = model()
    config = {
        "train_batch_size": communicator.world_size,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
        "optimizer": {"type": "ARSG", "params": {"lr": 0.1}},
    }
    return DeepSpeedEngine(module, config, communicator, parameter_groups=groups(module))


def ddp_engine(communicator: Any) -> Engine:
    from arsg_dist.ddp import DDPEngine

    module = model()
    return DDPEngine(module, ARSG(groups(module), lr=0.1), communicator)


def fsdp_engine(communicator: Any) -> Engine:
    from arsg_dist import fsdp

    module = model()
    fsdp.shard(module)
    return fsdp.FSDPEngine(module, ARSG(groups(module), lr=0.1), communicator, clip_grad_norm=1.0)


def whole(engine: Engine) -> list[Tensor]:
    weights = engine.communicator.from_rank_0(engine.whole_weights())
    return [value.clone() for value in weights.values()]


def update(engine: Engine) -> None:
    engine.backward(engine.module(torch.ones(1, 3)).square().sum())
    engine.step()


def raised_by(engine: Engine, change: Callable[[Engine], None]) -> str:
    """What an update raised before which the last rank made a change; the weights must be those of before."""
    before = whole(engine)
    if engine.communicator.rank == engine.communicator.world_size - 1:
        change(engine)
    try:
        update(engine)
    except JobError as error:
        assert all(map(torch.equal, before, whole(engine))), "updated all the same"
        return str(error)
    return ""


def raised_by_settings(engine: Engine) -> dict[str, str]:
    """What updates with each setting changed raised; then everything goes on."""
    update(engine)
    raised = {}
    group = engine.optimizer.param_groups[1]
    for setting, value in CHANGED.items():
        before = group[setting]
        raised[setting] = raised_by(engine, lambda _: group.update({setting: value}))  # noqa: B023
        group[setting] = before
        getattr(engine, "engine", engine.optimizer).zero_grad()
        if engine.kind != "deepspeed":
            engine._micro_batches = 0  # type: ignore[attr-defined]
    before_last = whole(engine)
    update(engine)
    assert not any(map(torch.equal, before_last, whole(engine))), "nothing trains any more"
    return raised


def write(engine: Engine) -> None:
    with torch.no_grad():
        engine.engine.module[1].weight[1].fill_(5.0)  # type: ignore[attr-defined]


def steps_with_adam(communicator: Any, stage: int) -> list[float]:
    """How far weights go in an update of torch's Adam with another lr on the last rank, of which nobody says a word."""
    import deepspeed

    module = model()
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=groups(module),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.125, betas=(0.0, 0.0), eps=1e-20),
        config={
            "train_batch_size": communicator.world_size,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
        },
    )
    for group in engine.basic_optimizer.param_groups:
        group["betas"] = (0.0, 0.0)
        group["lr"] = 0.25 if communicator.rank == communicator.world_size - 1 else 0.125
    engine.backward(engine(torch.ones(1, 3)).square().sum())
    engine.step()
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        pairs = zip(module.parameters(), model().parameters(), strict=True)
        moved = torch.cat([(now.detach() - before.detach()).abs().flatten() for now, before in pairs])
    return sorted({round(step, 4) for step in moved.tolist()})


def main() -> None:
    output, *names = (a for a in sys.argv[1:] if not a.startswith("--"))
    if names[0].startswith("stage"):
        from arsg_dist.deepspeed import connect
    else:
        from arsg_dist.ddp import connect  # type: ignore[assignment]
    communicator = connect(discover_ranks())
    results: dict[str, dict[str, str]] = {}
    for name in names:
        if name.startswith("stage"):
            engine = deepspeed_engine(communicator, int(name[-1]))
        else:
            engine = (ddp_engine if name == "ddp" else fsdp_engine)(communicator)
        results[name] = raised_by_settings(engine)
        if name == "stage1":
            results["written"] = {"": raised_by(engine, write)}
    adams = {name: steps_with_adam(communicator, int(name[-1])) for name in names if name.startswith("stage")}
    of_ranks = communicator.all_gather_object((results, adams))
    if communicator.rank == 0:
        torch.save(of_ranks, Path(output))
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
