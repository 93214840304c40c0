"""Run everything that can only be shown on a GPU, in order of worth.

    benchmarks/gpu/pack.sh                      # before: what that machine lacks, into benchmarks/gpu/bundle
    python -m benchmarks.gpu --dry              # before: the rehearsal, on the CPU
    python -m benchmarks.gpu --output DIR --to zero
    python -m benchmarks.gpu --output DIR --from resnet50
    python -m benchmarks.gpu.report DIR         # afterwards: benchmarks/results/gpu, and README's column

Every task is a process with a limit of its own, and one that fails or hangs costs no more than that. Results are
appended to DIR/results.jsonl as they come, what is printed to DIR/log.txt, and reports are written beside them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu.runner import ROOT, Record, run_stages
from benchmarks.gpu.stages import Setting, stages


def main() -> None:
    """Read the command line, and run."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__, formatter_class=shape)
    names = [stage.name for stage in stages(Setting(Path()))]
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ROOT / "runs/gpu")))
    parser.add_argument(
        "--from", dest="first", choices=names, default=names[0], metavar="STAGE", help=", ".join(names)
    )
    parser.add_argument("--to", dest="last", choices=names, default=names[-1], metavar="STAGE")
    parser.add_argument("--dry", action="store_true", help="rehearse on the CPU, with small sizes")
    parser.add_argument(
        "--short", action="store_true", help="with --dry: of each stage as little as shows that it runs"
    )
    arguments = parser.parse_args()
    if arguments.short and not arguments.dry:
        parser.error("--short is for the rehearsal: --dry --short")
    if names.index(arguments.first) > names.index(arguments.last):
        parser.error(f"--from {arguments.first} comes after --to {arguments.last}")
    if not arguments.dry:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device; --dry rehearses on the CPU")
    output = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    setting = Setting(output, "cpu" if arguments.dry else "cuda", arguments.short)
    chosen = stages(setting)[names.index(arguments.first) : names.index(arguments.last) + 1]
    if not run_stages(chosen, Record(output), environment_of(setting)):
        sys.exit(1)


def environment_of(setting: Setting) -> dict[str, str]:
    """Return the variables of all tasks: what was carried along is found behind what is there."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    found = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep), str(setting.output / "path")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in found if path)
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"], str(setting.output / "site/bin")]
    )
    environment["DS_ACCELERATOR"] = setting.device
    # What tasks compile is theirs alone: nobody else's lock, left or held, is waited for or removed.
    environment["TORCH_EXTENSIONS_DIR"] = str(setting.output / "torch_extensions")
    if setting.device == "cpu":
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


if __name__ == "__main__":
    main()
