"""Run an unmodified training script with "type": "ARSG" known to DeepSpeed.

deepspeed --module arsg_dist.deepspeed.run train.py ARGUMENTS
deepspeed --module arsg_dist.deepspeed.run -m package.train ARGUMENTS
python -m arsg_dist.deepspeed.run train.py ARGUMENTS
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

from arsg_dist.deepspeed.engine import forget_name
from arsg_dist.engine.job import BAD_INPUT


def main(arguments: list[str]) -> None:
    """Become the script: `sys.argv`, `sys.path`, `__main__` and exit code are its own.

    `--local_rank=N`, which the deepspeed launcher puts before the script's name, is handed on to the script as its
    first argument, as the launcher does without this module.

    Args:
        arguments: of this module, from the command line.
    """
    handed_on = []
    while arguments and arguments[0].startswith("--local"):
        handed_on.append(arguments.pop(0))
    module = bool(arguments) and arguments[0] == "-m"
    if module:
        del arguments[0]
    if not arguments or arguments[0].startswith("-"):
        _refuse("usage: deepspeed --module arsg_dist.deepspeed.run [-m MODULE | SCRIPT] [ARGUMENTS]")
    name = arguments.pop(0)
    sys.argv = [name, *handed_on, *arguments]
    try:
        if module:
            _first_on_path(os.getcwd())
            if not _exists(name):
                _refuse(f"there is no module {name}")
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            if not Path(name).exists():
                _refuse(f"the script {Path(name).absolute()} does not exist")
            _first_on_path(str(Path(name).resolve().parent))
            runpy.run_path(name, run_name="__main__")
    finally:
        if (
            "RANK" in os.environ
        ):  # a script that knows nothing of this package leaves DeepSpeed's memory behind
            forget_name(os.environ["RANK"])


def _first_on_path(directory: str) -> None:
    """Have Python look for modules there first, unless started with -P."""
    if not sys.flags.safe_path:
        sys.path[0] = directory


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _refuse(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"error: {message}" + ("" if rank == "0" else f" (rank {rank})"), file=sys.stderr)  # noqa: T201
    raise SystemExit(BAD_INPUT)


if __name__ == "__main__":
    main(sys.argv[1:])
