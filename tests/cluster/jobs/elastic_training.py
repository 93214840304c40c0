"""Job for one rank of a training that torchrun starts again, on as many ranks as there are then.

usage: elastic_training.py DIRECTORY      until DIRECTORY/stop exists; a line of DIRECTORY/log for each update
"""

import sys
import time
from pathlib import Path

import torch

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.ddp import DDPEngine, connect
from arsg_dist.engine import discover_ranks, end_process
from tests.support import toy

directory = Path(sys.argv[1])
communicator = connect(discover_ranks())
rank, world_size = communicator.rank, communicator.world_size
model = toy.build_model()
engine = DDPEngine(model, ARSG(model.parameters(), **toy.HYPERPARAMETERS), communicator)
store = CheckpointStore(directory / "checkpoints", communicator, keep=2)
update, newest = 0, store.latest()
if newest is not None:
    saved = SavedRun(newest)
    engine.load_state(saved)
    update = saved.progress["update"]
part = slice(rank * toy.BATCH // world_size, (rank + 1) * toy.BATCH // world_size)
try:
    while not communicator.start_any((directory / "stop").exists())():
        inputs, targets = toy.batch(update)
        engine.backward(toy.loss_of(engine.module(inputs[part]), targets[part]))
        engine.step()
        update += 1
        if update % 3 == 0:
            save_run(store, update, engine.state(), {"update": update}, communicator)
        if rank == 0:
            with open(directory / "log", "a") as log:
                log.write(f"{update} {world_size}\n")
        time.sleep(0.2)
    if rank == 0:
        torch.save({"update": update, "weights": engine.whole_weights()}, directory / "weights.pt")
    communicator.close()
except Exception as error:
    print(f"rank {rank} of {world_size}: {error}", file=sys.stderr, flush=True)
    end_process(1)
end_process(0)
