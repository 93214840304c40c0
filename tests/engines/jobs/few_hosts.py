"""Connects by an engine, and writes what it says of the hosts."""

import sys
from pathlib import Path

from arsg_dist.engine import JobError, discover_ranks, end_process, load_builder

directory, engine = sys.argv[1:3]
ranks = discover_ranks()
try:
    load_builder(engine).connect(ranks)
    said = "nothing"
except JobError as error:
    said = str(error)
(Path(directory) / f"{ranks.rank}.txt").write_text(said)
end_process(0)
