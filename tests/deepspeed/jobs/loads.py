"""Job for one rank of several: saves checkpoints for one rank to load, and loads those of `cases_on_ranks`.

usage: loads.py DIRECTORY [--local_rank=N]
"""

import sys
from pathlib import Path

from arsg_dist.engine import end_process
from tests.deepspeed import load_cases
from tests.deepspeed.jobs.common import gathered, job


def main() -> None:
    directory = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    with job(directory / "results.pt") as results:
        here = directory / "by several ranks"
        mine = load_cases.cases_on_ranks()
        for case in [*mine, *[case for case in load_cases.few_cases() if case.source == "other ranks"]]:
            if not (here / load_cases.source_name(case)).exists():
                load_cases.save_source(case, here)
        for case in mine:
            above = directory / "by one rank" if case.source == "other ranks" else here
            results[str(case)] = gathered(load_cases.run(case, above / load_cases.source_name(case)))


if __name__ == "__main__":
    main()
    end_process(0)
