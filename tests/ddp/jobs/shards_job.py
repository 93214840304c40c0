"""Job for one of two ranks: the update divided among them, saved and resumed, in all four ways of dividing or not.

usage: shards_job.py DIRECTORY
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.ddp import DDPEngine, Shards, connect
from arsg_dist.engine import Communicator, discover_ranks, end_process
from tests.support import toy

ACCUMULATION = 2
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "clipped": {"clip_grad_norm": 0.5},
    "buckets": {"bucket_cap_mb": 1e-6},  # one for each parameter: more than travel at a time
    "skipping": {"skip_nonfinite": True},
}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of other settings, and a parameter that none of them has."""
    weights = [x for x in model.parameters() if x.dim() > 1]
    return [
        {"params": weights[:1], "weight_decay": 0.1},
        {"params": weights[1:], "lr": 0.01},
        {"params": [x for x in model.parameters() if x.dim() == 1][1:]},
    ]


def build(
    communicator: Communicator, *, divided: bool, bucket_cap_mb: float = 25.0, **options: Any
) -> DDPEngine:
    model = toy.build_model()
    for parameter in model.parameters() if communicator.rank else ():
        nn.init.normal_(parameter)  # rank 0's weights are to be everybody's
    shards = Shards(groups(model), order=model.parameters(), bucket_cap_mb=bucket_cap_mb) if divided else None
    optimizer = ARSG(shards.groups if shards else groups(model), **toy.HYPERPARAMETERS)
    return DDPEngine(
        model, optimizer, communicator, accumulation_steps=ACCUMULATION, shards=shards, **options
    )


def train(engine: DDPEngine, first: int, last: int) -> None:
    size = toy.BATCH // engine.communicator.world_size // ACCUMULATION
    for update in range(first, last):
        inputs, targets = toy.batch(update)
        for micro_batch in range(ACCUMULATION):
            at = (engine.communicator.rank * ACCUMULATION + micro_batch) * size
            part = slice(at, at + size)
            engine.backward(toy.loss_of(engine.module(inputs[part]), targets[part]))
            engine.step()


def held(engine: DDPEngine) -> int:
    states = engine.optimizer.state.values()
    return sum(value.numel() for state in states for value in state.values() if torch.is_tensor(value))


def main() -> None:
    directory = Path(sys.argv[1])
    communicator = connect(discover_ranks())
    results: dict[str, Any] = {}
    for name, options in CASES.items():
        engine = build(communicator, divided=True, **options)
        train(engine, 0, 2)
        if options.get("skip_nonfinite"):
            for micro_batch in range(ACCUMULATION):  # the last one of one rank is bad
                bad = communicator.rank == 1 and micro_batch == ACCUMULATION - 1
                engine.backward(engine.module(toy.batch(0)[0]).sum() * (torch.nan if bad else 1.0))
                engine.step()
        train(engine, 2, toy.UPDATES)
        results[name] = engine.whole_weights()
        results[f"{name}: skipped"] = engine.skipped_updates
    results["held"] = communicator.all_gather_object(held(engine))
    with engine.base_iterate():
        results["theta"] = engine.whole_weights()
    results["after"] = engine.whole_weights()
    for before in (True, False):
        engine = build(communicator, divided=before)
        train(engine, 0, 2)
        store = CheckpointStore(directory / f"divided {before}", communicator)
        path = save_run(store, 1, engine.state(), {}, communicator)
        for after in (True, False):
            engine = build(communicator, divided=after)
            engine.optimizer.param_groups[0]["lr"] = 1.0
            engine.load_state(SavedRun(path))
            train(engine, 2, toy.UPDATES)
            results[f"divided {before} to {after}"] = engine.whole_weights()
    if communicator.rank == 0:
        torch.save(results, directory / "results.pt")
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
