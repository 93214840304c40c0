"""Job for one rank: every case of `few_bits` on each engine of a family.

usage: few_bits_job.py FAMILY DIRECTORY [--local_rank=N]
"""

import sys
from pathlib import Path

import torch

from arsg_dist.engine import end_process
from tests.engines import few_bits
from tests.support.checkpoint_matrix_job import connect


def main() -> None:
    few_bits.with_rounding_of_one_process()
    family, folder = (a for a in sys.argv[1:] if not a.startswith("--"))
    directory, communicator = Path(folder), connect(family)
    for label in few_bits.CASES:
        for name in few_bits.engines_of(family, label):
            source = next((directory / "single" / label).glob("step-*"))
            where = directory / f"{name}-{communicator.world_size}" / label
            found = few_bits.follow(name, label, communicator, where, source)
            if communicator.rank == 0:
                torch.save(found, where / "found.pt")
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
