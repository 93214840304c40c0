import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm
from tests.cluster.rehearsal import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four rehearsal hosts with Slurm, one set for all tests; a test leaves them as it found them."""
    reason = why_not() or slurm.why_not()
    if reason:
        if os.environ.get("CI"):
            print(f"cluster tests skipped: {reason}", file=sys.stderr)
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("cluster"), 4, str(Path(sys.executable).parent))
    slurm.configure(made)
    try:
        made.start()
        slurm.start(made)
        yield made
    finally:
        made.stop()
