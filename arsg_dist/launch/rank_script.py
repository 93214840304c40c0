"""Run this path as a kept `arsg-dist launch --dry-run` has it: `cli/launch/rank_script.py`. It imports nothing, too."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    moved = Path(__file__).parents[1] / "cli" / "launch" / "rank_script.py"
    print(f"{__file__} will be removed: it is {moved}", file=sys.stderr)  # noqa: T201
    runpy.run_path(str(moved), run_name="__main__")
