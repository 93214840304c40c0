"""Job for one of two ranks: the cases of `optimizer_cases` with every form, one result per case, form and rank.

usage: optimizer_job.py OUTPUT_DIRECTORY
"""

import gc
import sys
import warnings
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch

from tests.horovod.jobs import run_job
from tests.horovod.jobs.optimizer_cases import CASES, Place


def main() -> None:
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        for form in case.forms:
            try:
                found: Any = case.run(Place(form, hvd.rank(), name), **case.settings)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            results[f"{name}, {form}"] = hvd.allgather_object(found)
    gc.collect()
    if hvd.rank() == 0:
        torch.save(results, Path(sys.argv[1]) / "results.pt")


if __name__ == "__main__":
    run_job(main)
