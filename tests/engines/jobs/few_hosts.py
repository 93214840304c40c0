"""Connects by each of some engines, and writes what each says of the hosts."""

import json
import sys
from pathlib import Path

from arsg_dist.engine import JobError, discover_ranks, end_process, load_builder

ranks, said = discover_ranks(), {}
for name in sys.argv[2:]:
    try:
        load_builder(name).connect(ranks)
    except JobError as error:
        said[name] = str(error)
(Path(sys.argv[1]) / f"{ranks.rank}.json").write_text(json.dumps(said))
end_process(0)
