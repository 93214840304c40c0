"""Job for one rank: goes on with the toy problem from a checkpoint of any engine, and writes the next one.

usage: sharded_engine_job.py ENGINE DIRECTORY FIRST_UPDATE LAST_UPDATE

ENGINE is "sharded", "horovod" or "single". Reads DIRECTORY/FIRST_UPDATE unless that is 0, writes DIRECTORY/LAST_UPDATE.
"""

import sys
from pathlib import Path

import torch

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import Engine, SingleProcessEngine, discover_ranks, end_process
from tests.support import toy

ACCUMULATION_STEPS = 2
CLIP = 0.5


def main() -> None:
    name, directory, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    model = toy.build_model()
    optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    engine: Engine
    options = {"accumulation_steps": ACCUMULATION_STEPS, "clip_grad_norm": CLIP}
    if name == "single":
        engine = SingleProcessEngine(model, optimizer, **options)
    else:
        from arsg_dist import horovod

        communicator = horovod.connect(discover_ranks())
        if name == "sharded":
            engine = horovod.HorovodShardedEngine(model, optimizer, communicator, bucket_mb=0.01, **options)
        else:
            engine = horovod.HorovodEngine(model, optimizer, communicator, **options)
    communicator = engine.communicator
    if first:
        saved = SavedRun(directory / str(first) / f"step-{first:09d}")
        engine.load_state(saved)
        assert saved.progress == {"update": first}
    micro_batch = toy.BATCH // (communicator.world_size * ACCUMULATION_STEPS)
    for update in range(first, last):
        inputs, targets = toy.batch(update)
        for step in range(ACCUMULATION_STEPS):
            start = (step * communicator.world_size + communicator.rank) * micro_batch
            part = slice(start, start + micro_batch)
            engine.backward(toy.loss_of(engine.module(inputs[part]), targets[part]))
            engine.step()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with engine.base_iterate():
        moved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(torch.equal(moved[key], before[key]) for key in before)
    target = directory / str(last)
    save_run(CheckpointStore(target, communicator), last, engine.state(), {"update": last}, communicator)
    if communicator.rank == 0:
        torch.save(moved, target / "base_iterate.pt")
    communicator.barrier()
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
