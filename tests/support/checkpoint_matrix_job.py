"""Job for one rank: saves with each engine of a family, or loads what all engines have saved into each of them.

usage: checkpoint_matrix_job.py save|load|load-all|half FAMILY DIRECTORY [--local_rank=N]
"""

import json
import sys
from pathlib import Path
from typing import Any

from arsg_dist.checkpoint import SavedRun
from arsg_dist.engine import SingleProcessCommunicator, connect_torch, discover_ranks, end_process
from tests.support import checkpoint_matrix as matrix

PROGRESS = {"update": matrix.SAVE_AFTER, "images": 72, "loss": 0.1 + 0.2, "nothing": None}


def main() -> None:
    what, family, folder = (a for a in sys.argv[1:] if not a.startswith("--"))
    directory, communicator = Path(folder), connect(family)
    for name in matrix.FAMILIES[family]:
        if what == "save":
            engine = matrix.build_engine(name, communicator)
            matrix.train(engine, 0, matrix.SAVE_AFTER)
            to = directory / f"{name}-{communicator.world_size}"
            matrix.save(engine, to, PROGRESS, wait=communicator.world_size != 2)
        elif what != "half":
            load(name, directory, communicator, every=what == "load-all")
        else:
            half(name, directory, communicator)
    communicator.close()
    end_process(0)


def connect(family: str) -> Any:
    if family == "single":
        return SingleProcessCommunicator()
    if family == "horovod":
        from arsg_dist import horovod

        return horovod.connect(discover_ranks())
    if family == "torchrun":
        return connect_torch(discover_ranks())
    from arsg_dist import deepspeed

    return deepspeed.connect(discover_ranks())


def load(name: str, directory: Path, communicator: Any, *, every: bool) -> None:
    """Each checkpoint in turn: load, save again, train on, save the end; into fresh and into stepped engines."""
    engine, losses = matrix.build_engine(name, communicator), {}
    me = f"{name}-{communicator.world_size}"
    for number, (source, ranks) in enumerate(matrix.sources_for(name, communicator.world_size, every=every)):
        if number % 6 == 5:
            engine = matrix.build_engine(name, communicator)
        saved = SavedRun(matrix.checkpoint(directory, source, ranks))
        engine.load_state(saved)
        matrix.save(engine, directory / "again" / f"{source}-{ranks} {me}", saved.progress)
        losses[f"{source}-{ranks}"] = matrix.train(engine, matrix.SAVE_AFTER, matrix.UPDATES)
        matrix.save(engine, directory / "end" / f"{source}-{ranks} {me}", {})
    if communicator.rank == 0:
        (directory / f"losses {me}.json").write_text(json.dumps(losses))


def half(name: str, directory: Path, communicator: Any) -> None:
    """bf16 parameters with fp32 masters: goes on from what the one before has saved, a chain through the engines."""
    if name in ("single", "ddp", "ddp-divided", "horovod", "zero0"):
        return
    engine = matrix.build_engine(name, communicator, half=True)
    chain = sorted((directory / "chain").glob("*"))
    if chain:
        saved = SavedRun(chain[-1] / "step-000000001")
        engine.load_state(saved)
        matrix.save(engine, directory / "again" / f"{chain[-1].name} {name}", saved.progress)
    communicator.barrier()
    matrix.train(engine, len(chain), len(chain) + 1)
    matrix.save(engine, directory / "chain" / f"{len(chain):02d}-{name}-{communicator.world_size}", PROGRESS)


if __name__ == "__main__":
    main()
