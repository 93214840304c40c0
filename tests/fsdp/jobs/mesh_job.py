"""Job for one of four ranks: FSDP over a 2 × 2 mesh (replicas of shards) against one process, saved and resumed.

usage: mesh_job.py DIRECTORY
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.checkpoint.dcp import DCPCheckpoint, to_dcp
from arsg_dist.engine import Communicator, discover_ranks, end_process
from arsg_dist.engine.state import PARAMETER
from arsg_dist.fsdp import FSDPEngine, connect, shard
from tests.fsdp import features
from tests.support import toy

HIDDEN = (12, 8)
OPTIMIZERS: dict[str, dict[str, object]] = {
    "reference": {"foreach": False},
    "foreach": {"foreach": True, "preconditioner": "adam"},
    "fused": {"fused": True},
}


def differences(ours: SavedRun, theirs: DCPCheckpoint) -> list[str]:
    """What the same run, saved in two formats, has in one of them only, or with other bits."""
    found = [name for name in ours.parameters if ours.entries(name) != theirs.entries(name)]
    for name in ours.parameters:
        for entry in {PARAMETER} | ours.entries(name):
            if not torch.equal(ours.whole(entry, name), theirs.whole(entry, name)):
                found.append(f"{entry} of {name}")
    return found + sorted({*ours.parameters} ^ {*theirs.parameters})


def state_of(engine: FSDPEngine) -> dict[str, object]:
    model, optimizer = get_state_dict(engine.module, engine.optimizer)
    return {"model": model, "optim": optimizer}


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


def tensor_parallel(shards: int, settings: dict[str, object]) -> dict[str, torch.Tensor]:
    """Train a network with a layer cut by columns and one by rows, and the rest of the ranks as FSDP."""
    model = toy.build_model(*HIDDEN)
    mesh = init_device_mesh("cpu", (shards, 4 // shards), mesh_dim_names=("shard", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if shards > 1:
        fully_shard(model, mesh=mesh["shard"])
    optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS, **settings)
    size = toy.BATCH // shards
    part = slice(mesh["shard"].get_local_rank() * size, (mesh["shard"].get_local_rank() + 1) * size)
    for update in range(toy.UPDATES):
        optimizer.zero_grad()
        inputs, targets = toy.batch(update)
        toy.loss_of(model(inputs[part]), targets[part]).backward()
        optimizer.step()
    weights = model.state_dict()
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()}


def main() -> None:
    directory = Path(sys.argv[1])
    communicator = connect(discover_ranks())
    _, engine = build(communicator)
    train(engine, 0, 2)
    store = CheckpointStore(directory, communicator)
    path = save_run(store, 1, engine.state(), {}, communicator)
    _, resumed = build(communicator)
    resumed.load_state(SavedRun(path))

    # As a script without this project saves and loads: shards by every rank, replicas once.
    dcp.save(state_of(resumed), checkpoint_id=directory / "theirs")
    if communicator.rank == 0:
        to_dcp(SavedRun(path), directory / "ours")
    dist.barrier()
    _, script = build(communicator)
    state = state_of(script)
    dcp.load(state, checkpoint_id=directory / "ours")
    set_state_dict(
        script.module, script.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )

    loss = engine.module(toy.batch(0)[0]).sum()  # one rank's gradient is not finite: no rank makes the update
    engine.backward(loss * (torch.nan if communicator.rank == 3 else 1.0))
    engine.step()
    train(engine, 2, toy.UPDATES)
    train(resumed, 2, toy.UPDATES)
    train(script, 2, toy.UPDATES)
    results = {"skipped": engine.skipped_updates, "trained": engine.whole_weights()}
    results["resumed"] = resumed.whole_weights()
    results["through torch's format"] = script.whole_weights()
    results["differences"] = differences(SavedRun(path), DCPCheckpoint(directory / "theirs"))
    with engine.base_iterate():
        results["theta"] = engine.whole_weights()
        results["logits at theta"] = engine.module(toy.batch(0)[0]).detach()
    results["after"] = engine.whole_weights()
    for name, settings in OPTIMIZERS.items():
        results[f"row and column, {name}"] = tensor_parallel(1, settings)
        results[f"two dimensions, {name}"] = tensor_parallel(2, settings)
    results |= features.results(communicator, directory)
    if communicator.rank == 0:
        torch.save(results, directory / "results.pt")
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
