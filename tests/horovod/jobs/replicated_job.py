"""Job for one rank: runs the cases of `replicated_cases` and saves what happened.

usage: replicated_job.py WRAPPER OUTPUT        WRAPPER: arsg_dist or horovod
"""

import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

from arsg_dist.engine import discover_ranks, end_process
from arsg_dist.horovod import DistributedOptimizer, connect
from tests.horovod.jobs.replicated_cases import CASES, Place


def main() -> None:
    wrapper, output = sys.argv[1:]
    communicator = connect(discover_ranks())
    wrap = DistributedOptimizer if wrapper == "arsg_dist" else hvd.DistributedOptimizer
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if wrapper == "horovod" and case.plain_horovod == "hangs":
            continue
        settings = dict(case.settings)
        if settings.get("compression") == "fp16":
            settings["compression"] = hvd.Compression.fp16
        place = Place(communicator.rank, communicator.world_size, wrap, prefix=name)
        try:
            weights = case.run(place, **settings)
        except Exception as error:
            if wrapper == "arsg_dist":
                traceback.print_exc()
            results[name] = type(error).__name__
            continue
        results[name] = weights
        if wrapper == "arsg_dist":
            for other in communicator.all_gather_object(weights):
                assert all(torch.equal(weights[key], other[key]) for key in weights), (
                    f"{name}: ranks hold different weights"
                )
    if communicator.rank == 0:
        torch.save(results, Path(output))
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
