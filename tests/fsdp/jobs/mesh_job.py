"""Job for one of four ranks: FSDP over a 2 × 2 mesh (replicas of shards) against one process, saved and resumed.

usage: mesh_job.py DIRECTORY
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import Communicator, discover_ranks, end_process
from arsg_dist.fsdp import FSDPEngine, connect, shard
from tests.support import toy


def build(communicator: Communicator) -> tuple[nn.Module, FSDPEngine]:
    model = toy.build_model()
    if communicator.rank:  # what other ranks begin with is not to matter
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))
    optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    return model, FSDPEngine(model, optimizer, communicator, clip_grad_norm=0.5, skip_nonfinite=True)


def train(engine: FSDPEngine, first: int, last: int) -> None:
    size = toy.BATCH // engine.communicator.world_size
    part = slice(engine.communicator.rank * size, (engine.communicator.rank + 1) * size)
    for update in range(first, last):
        inputs, targets = toy.batch(update)
        engine.backward(toy.loss_of(engine.module(inputs[part]), targets[part]))
        engine.step()


def main() -> None:
    directory = Path(sys.argv[1])
    communicator = connect(discover_ranks())
    _, engine = build(communicator)
    train(engine, 0, 2)
    store = CheckpointStore(directory, communicator)
    path = save_run(store, 1, engine.state(), {}, communicator)
    _, resumed = build(communicator)
    resumed.load_state(SavedRun(path))

    loss = engine.module(toy.batch(0)[0]).sum()  # one rank's gradient is not finite: no rank makes the update
    engine.backward(loss * (torch.nan if communicator.rank == 3 else 1.0))
    engine.step()
    train(engine, 2, toy.UPDATES)
    train(resumed, 2, toy.UPDATES)
    results = {"skipped": engine.skipped_updates, "trained": engine.whole_weights()}
    results["resumed"] = resumed.whole_weights()
    with engine.base_iterate():
        results["theta"] = engine.whole_weights()
        results["logits at theta"] = engine.module(toy.batch(0)[0]).detach()
    results["after"] = engine.whole_weights()
    if communicator.rank == 0:
        torch.save(results, directory / "results.pt")
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
