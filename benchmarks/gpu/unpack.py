"""Unpack what pack.sh has made, where later tasks find it: behind what is installed there."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

from benchmarks.gpu.runner import say

BUNDLE = Path(__file__).parent / "bundle/site.tar.gz"


def main() -> None:
    """Unpack below the folder of the command line, from the bundle or what else is named there."""
    folder = Path(sys.argv[1])
    bundle = Path(sys.argv[2]) if len(sys.argv) > 2 else BUNDLE
    if not bundle.exists():
        say(kind="bundle", found=False)
        return
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with tarfile.open(bundle) as archive:
        written = archive.extractfile("./python-version")
        assert written is not None
        version = written.read().decode().strip()
        if version != here:
            say(kind="bundle", found=False, reason=f"it is for Python {version}, and this is {here}")
            return
        (folder / "site").mkdir(parents=True, exist_ok=True)
        archive.extractall(folder / "site", filter="data")
    # What is in PYTHONPATH comes before what is installed, and what this module appends behind it.
    (folder / "path").mkdir(exist_ok=True)
    (folder / "path/sitecustomize.py").write_text(
        f"import sys\n\nsys.path.append({str(folder / 'site')!r})\n"
    )
    say(kind="bundle", found=True, packages=sorted(p.name for p in (folder / "site").glob("*.dist-info")))


if __name__ == "__main__":
    main()
