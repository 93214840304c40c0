"""Job for one rank: every optimizer of `optimizer_cases` on each engine of a family.

usage: optimizers_job.py FAMILY DIRECTORY [--local_rank=N]
"""

import sys
from pathlib import Path

import torch

from arsg_dist.engine import end_process
from tests.engines import optimizer_cases as optimizers
from tests.support.checkpoint_matrix import FAMILIES
from tests.support.checkpoint_matrix_job import connect


def main() -> None:
    family, folder = (a for a in sys.argv[1:] if not a.startswith("--"))
    directory, communicator = Path(folder), connect(family)
    for label, case in optimizers.CASES.items():
        for name in FAMILIES[family]:
            if name in case.engines:
                source = next((directory / "single" / label).glob("step-*"))
                where = directory / f"{name}-{communicator.world_size}" / label
                found = optimizers.follow(name, case, communicator, where, source)
                if communicator.rank == 0:
                    torch.save(found, where / "found.pt")
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
