"""train.py for 'python -m', which does not look for modules beside the file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import runpy

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "train.py"), run_name="__main__")
