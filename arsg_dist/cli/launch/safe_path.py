"""Keep modules of the current directory out of launchers, not of user scripts.

`python -m MODULE` imports from the current directory first, and that may be a folder from anywhere with a hjson.py in
it. A Python that we start gets -P. A launcher that starts more of them by itself gets PYTHONSAFEPATH, which reaches the
ranks too; `python SCRIPT` would then not find the modules beside the script, so the variable is taken from it again.
"""

from pathlib import Path

from arsg_dist.cli.launch import rank_script
from arsg_dist.cli.launch.job import Job

_VARIABLE = rank_script.VARIABLE


def launcher_environment(job: Job) -> dict[str, str]:
    """Return variables for a launcher that starts more Pythons than the ranks."""
    return {} if _users_own(job) else {_VARIABLE: "1"}


def rank_command(job: Job) -> tuple[str, ...]:
    """Return what one rank executes, under a launcher that starts any command."""
    return job.rank_command if _users_own(job) else ("env", "-u", _VARIABLE, *job.rank_command)


def script_and_arguments(job: Job) -> tuple[str, ...]:
    """Return script and arguments, for a launcher that starts Python scripts only."""
    return job.program if _users_own(job) else (str(Path(rank_script.__file__)), *job.program)


def _users_own(job: Job) -> bool:
    """Say whether the user wants the ranks' scripts so, too."""
    return _VARIABLE in job.inherited or job.user.find(_VARIABLE) is not None
