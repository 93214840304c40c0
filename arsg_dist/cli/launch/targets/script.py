"""Write what the batch scripts of all schedulers share."""

import argparse
import re

from arsg_dist.cli.launch import supervise
from arsg_dist.cli.launch.job import Job
from arsg_dist.cli.launch.quoting import for_bash

_WORD = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]*-]+")


def add_batch_arguments(parser: argparse.ArgumentParser, time: str) -> None:
    """Declare the options that every scheduler has."""
    parser.add_argument("--job-name", default="arsg", help="name in the queue (default: %(default)s)")
    parser.add_argument(
        "--time", default=time, help="wall-clock limit, as the scheduler takes it (default: %(default)s)"
    )
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


def exports(environment: dict[str, str]) -> list[str]:
    """Return `export` lines."""
    return [f"export {name}={for_bash(value)}" for name, value in sorted(environment.items())]


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


def first_host(command: str) -> list[str]:
    """Set MASTER_ADDR and MASTER_PORT.

    Without them each DeepSpeed rank may take itself for a job of one.

    The port is another one at each start, below those that systems give out: the number of a job, which everybody sees
    in the queue, would tell others where its ranks meet.

    Args:
        command: prints the name of the first host.
    """
    return [
        f"export MASTER_ADDR=$({command})",
        "export MASTER_PORT=$((20000 + $(od -An -N2 -tu2 /dev/urandom) % 10000))",
    ]
