"""Job for one rank: every case of a module on each engine of a family that can.

usage: followed_job.py MODULE FAMILY DIRECTORY [--local_rank=N]
"""

import importlib
import sys
from pathlib import Path

import torch

from arsg_dist.engine import end_process
from tests.engines.followed import follow
from tests.support.checkpoint_matrix_job import connect


def main() -> None:
    module, family, folder = (a for a in sys.argv[1:] if not a.startswith("--"))
    cases = importlib.import_module(module)
    directory, communicator = Path(folder), connect(family)
    for label in cases.CASES:
        for name in cases.engines_of(family, label):
            source = next((directory / "single" / label).glob("step-*"))
            where = directory / f"{name}-{communicator.world_size}" / label
            found = follow(cases, name, label, communicator, where, source)
            if communicator.rank == 0:
                torch.save(found, where / "found.pt")
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
