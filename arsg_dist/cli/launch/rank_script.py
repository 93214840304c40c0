"""Become the user's script, without the PYTHONSAFEPATH of its launcher.

    python -u .../rank_script.py [--local_rank=N] SCRIPT ARGUMENTS

Executed by its path. It imports nothing of this package, which would take each rank seconds.
"""

import os
import sys

VARIABLE = "PYTHONSAFEPATH"


def command(arguments: list[str]) -> list[str]:
    """Return the command of the script as the deepspeed launcher has it without this file.

    Args:
        arguments: of this file; `--local_rank=N`, which the launcher puts first, is handed on as the script's first.
    """
    first = next(index for index, argument in enumerate(arguments) if not argument.startswith("--local"))
    return [sys.executable, "-u", arguments[first], *arguments[:first], *arguments[first + 1 :]]


if __name__ == "__main__":
    os.environ.pop(VARIABLE, None)
    os.execv(sys.executable, command(sys.argv[1:]))
