"""Unpack what pack.sh has made, where later tasks find it."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

from benchmarks.gpu.runner import say

BUNDLE = Path(__file__).parent / "bundle/site.tar.gz"


def main() -> None:
    """Unpack into the folder of the command line."""
    target = Path(sys.argv[1])
    if not BUNDLE.exists():
        say(kind="bundle", found=False)
        return
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(BUNDLE) as archive:
        archive.extractall(target, filter="data")
    found = sorted(path.name for path in target.glob("*.dist-info"))
    say(kind="bundle", found=True, packages=found)


if __name__ == "__main__":
    main()
