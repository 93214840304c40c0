"""Write what the batch scripts of all schedulers share."""

import argparse
import re
from collections.abc import Container, Mapping

from arsg_dist.cli.launch import supervise
from arsg_dist.cli.launch.job import Job
from arsg_dist.cli.launch.quoting import for_bash
from arsg_dist.cli.launch.settings import FAMILIES, GIVEN, LISTS, join, same_as
from arsg_dist.engine.hosts import EXPECTED_HOSTS

_WORD = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]*-]+")


JOB_NAME = "arsg"


def add_batch_arguments(parser: argparse.ArgumentParser, time: str) -> None:
    """Declare the options that every scheduler has; None is one that the user has not given."""
    parser.add_argument("--job-name", help=f"name in the queue (default: {JOB_NAME})")
    parser.add_argument("--time", help=f"wall-clock limit, as the scheduler takes it (default: {time})")
    parser.add_argument("--account", help="what the time is charged to")
    parser.add_argument("--queue", help="queue or partition")
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line to run first, for example 'module load nccl'; repeatable",
    )


def word(value: str, option: str) -> str:
    """Check a value for a directive line (#SBATCH ...), where no shell quotes.

    Raises:
        ValueError: it has a space or another character that would end the value.
    """
    if not _WORD.fullmatch(value):
        raise ValueError(f"{option} {value!r} must be one word of letters, digits and _@%+=:,./[]*-")
    return value


def start_lines(job: Job) -> list[str]:
    """Return the first lines: go to the directory, if inherited variables are there."""
    lines = ["set -u"]
    for name in job.inherited:
        message = f"the scheduler did not hand {name} on: export it where you submit the job"
        lines.append(f'[ -n "${{{name}:-}}" ] || {{ echo {for_bash(message)} >&2; exit 2; }}')
    return [*lines, f"cd {for_bash(str(job.directory))} || exit 2"]


def fixed_exports(environment: Mapping[str, str]) -> list[str]:
    """Return `export` lines."""
    return [f"export {name}={for_bash(value)}" for name, value in sorted(environment.items())]


def exports(job: Job, environment: Mapping[str, str]) -> list[str]:
    """Return `export` lines that leave what is set in the job alone: by the scheduler, a module, a line of --setup.

    Args:
        job: to be started; what its user gives by --env counts in any case.
        environment: the variables with their values, from `settings.join`.
    """
    lines = []
    for name, value in sorted(environment.items()):
        fixed = name in job.user.given or name == EXPECTED_HOSTS
        unless_set = "" if fixed else f'[ -n "${{{name}:-}}" ] || '
        lines.append(f"{unless_set}export {name}={for_bash(value)}")
    return lines


def added_exports(job: Job, wanted: Mapping[str, str]) -> list[str]:
    """Return `export` lines for a launcher's own settings, of which some are lists that are added to.

    Args:
        job: to be started.
        wanted: by the target, not joined with the user's.
    """
    lists = {name: value for name, value in wanted.items() if name in LISTS}
    others, _ = join({name: value for name, value in wanted.items() if name not in LISTS}, job.user)
    lines = exports(job, others)
    for name, value in sorted(lists.items()):
        found = job.user.find(name, *same_as(name))
        if found is not None:
            unless_set = "" if found.source == GIVEN else f'[ -n "${{{name}:-}}" ] || '
            lines.append(f"{unless_set}export {name}={for_bash(found.value)}")
        lines.append(f'export {name}="${{{name}:+${name} }}{value}"')
    return lines


def of_families(job: Job) -> list[str]:
    """Return `export` lines for settings that are set here, where a scheduler hands nothing on."""
    return exports(
        job, {name: value for name, value in job.user.of_families().items() if name not in job.environment}
    )


def handed_on_by_mpirun() -> str:
    """Return a line that sets the array `families` to mpirun's options for the libraries' settings there are."""
    patterns = "|".join(
        f"{prefix}*" for prefix in FAMILIES if "_MCA_" not in prefix
    )  # those travel by themselves
    return (
        f'families=(); for name in $(compgen -A export); do case "$name" in {patterns}) families+=(-x "$name");; esac; '
        "done"
    )


def watched(job: Job, launcher: str) -> str:
    """Return `launcher` under `supervise`, which fails when a host is lost."""
    return f"{for_bash(job.python)} {' '.join(job.python_module[1:])} {supervise.__name__} {launcher}"


def program_lines(job: Job, rank_command: tuple[str, ...]) -> list[str]:
    """Set the array `program` to what a rank executes, with --resume if possible.

    arsg-imagenet has `--resume auto` already (`with_resume_auto`). Of another program with an --output it is assumed
    that it has --resume, for a directory with checkpoints.
    """
    lines = [f"program=({' '.join(map(for_bash, rank_command))})"]
    output = job.argument("--output")
    if output is not None and job.argument("--resume") is None and "--resume" not in job.program:
        lines += [
            "# A requeued or resubmitted job goes on where there are checkpoints.",
            f'if [ -n "$(ls -A {for_bash(output)}/checkpoints 2>/dev/null)" ]; then program+=(--resume); fi',
        ]
    return lines


def first_host(command: str, given: Container[str] = ()) -> list[str]:
    """Set MASTER_ADDR and MASTER_PORT, but those that --env gives.

    Without them each DeepSpeed rank may take itself for a job of one.

    The port is another one at each start, below those that systems give out: the number of a job, which everybody sees
    in the queue, would tell others where its ranks meet.

    Args:
        command: prints the name of the first host.
        given: names of variables that the user gives.
    """
    lines = {
        "MASTER_ADDR": f"export MASTER_ADDR=$({command})",
        "MASTER_PORT": "export MASTER_PORT=$((20000 + $(od -An -N2 -tu2 /dev/urandom) % 10000))",
    }
    return [line for name, line in lines.items() if name not in given]


def not_taken(job: Job) -> tuple[str, ...]:
    """Say which meeting point of the environment here is not the job's: it may be that of another job."""
    return tuple(
        f"{name}={job.user.here[name]} of the environment here is not used: the job's own first host and a free port "
        f"are; --env {name}=... chooses another"
        for name in ("MASTER_ADDR", "MASTER_PORT")
        if job.user.here.get(name) and name not in job.user.given
    )
