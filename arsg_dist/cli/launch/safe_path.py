"""Modules of the current directory stay out of the launchers, and a user's script finds its neighbours as ever.

`python -m MODULE` imports from the current directory first, and that may be a folder from anywhere with a hjson.py in
it. A Python that we start gets -P. A launcher that starts more of them by itself gets PYTHONSAFEPATH, which reaches the
ranks too; `python SCRIPT` would then not find the modules beside the script, so the variable is taken from it again.
"""

import os
from pathlib import Path

from arsg_dist.cli.launch import rank_script
from arsg_dist.cli.launch.job import Job

_VARIABLE = rank_script.VARIABLE


def launcher_environment(job: Job) -> dict[str, str]:
    """Return the variables of a launcher that starts other Python processes than the ranks."""
    return {} if _users_own(job) else {_VARIABLE: "1"}


def rank_command(job: Job) -> tuple[str, ...]:
    """Return what one rank executes, for a launcher with `launcher_environment` that starts any command."""
    return job.rank_command if _users_own(job) else ("env", "-u", _VARIABLE, *job.rank_command)


def script_and_arguments(job: Job) -> tuple[str, ...]:
    """Return a Python script and its arguments, for a launcher with `launcher_environment` that starts only those."""
    return job.program if _users_own(job) else (str(Path(rank_script.__file__)), *job.program)


def _users_own(job: Job) -> bool:
    """Whether the user wants the ranks' scripts so, too."""
    return _VARIABLE in job.environment or _VARIABLE in job.inherited or bool(os.environ.get(_VARIABLE))
