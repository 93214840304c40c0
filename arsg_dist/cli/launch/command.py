"""Start a program on many machines: `arsg-dist launch TARGET ... -- SCRIPT ...`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from arsg_dist.cli.launch.job import (
    Host,
    Job,
    Plan,
    check_environment,
    is_script,
    is_variable,
    parse_hosts,
    read_hostfile,
)
from arsg_dist.cli.launch.profiles import Profile, load_profile, profile_names
from arsg_dist.cli.launch.supervise import run_watched
from arsg_dist.cli.launch.targets import TARGETS, Target
from arsg_dist.engine.job import BAD_INPUT
from arsg_dist.safe_io import files

SUMMARY = "start a training on this machine, a list of hosts, or through a scheduler"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one subcommand per target, with common options and its own."""
    targets = parser.add_subparsers(dest="target", metavar="TARGET", required=True)
    for name, kind in TARGETS.items():
        target = kind()
        sub = targets.add_parser(
            name,
            help=target.summary,
            description=f"{target.summary}. Everything after -- is the Python script to start and its arguments.",
            allow_abbrev=False,
        )
        _add_common(sub, target)
        target.add_arguments(sub)
        sub.add_argument(
            "program", nargs="+", metavar="-- SCRIPT", help="what every rank runs, and its arguments"
        )


def _add_common(parser: argparse.ArgumentParser, target: Target) -> None:
    if len(target.rendezvous) > 1:
        parser.add_argument(
            "--engine", choices=target.engines(), required=True, help="what the program trains with"
        )
    if target.places == "hosts":
        hosts = parser.add_mutually_exclusive_group(required=True)
        hosts.add_argument("--hosts", help="hosts and their ranks, node1:4,node2:4")
        hosts.add_argument("--hostfile", type=Path, help="file of lines 'node1 slots=4'")
    else:
        if target.places == "nodes":
            parser.add_argument("--nodes", type=int, default=1, help="machines (default: %(default)s)")
        parser.add_argument("--ranks-per-node", type=int, required=True, help="one per GPU")
        parser.add_argument("--cpu", action="store_true", help="the ranks have no GPUs")
    parser.add_argument("--profile", choices=profile_names(), help="settings of a site or network")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="for every rank; without a value the one that NAME has here, which is then written into no file and no "
        "command (for keys and passwords); repeatable",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter on every host (default: %(default)s)"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path.cwd(),
        help="working directory on every host (default: this one)",
    )
    parser.add_argument(
        "--detect-seconds",
        type=int,
        default=60,
        help="the silent loss of a host ends the job within this time; more if ranks may wait longer "
        "for each other, for example while one writes a large checkpoint (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")


def run(options: argparse.Namespace) -> int:
    """Plan and, without --dry-run, write the files and execute the command.

    Returns:
        The command's exit code; 2 for bad input; 0 after --dry-run.
    """
    try:
        plan = make_plan(options)
        if options.dry_run:
            print(plan)  # noqa: T201
            return 0
        return _execute(plan, options.directory.absolute())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT


def make_plan(options: argparse.Namespace) -> Plan:
    """Plan what the options ask for.

    Raises:
        ValueError: they contradict each other, or the target cannot do it.
        OSError: the hostfile cannot be read.
    """
    target = TARGETS[options.target]()
    profile = load_profile(options.profile)
    environment, inherited = _variables(options.env, profile)
    if inherited and target.cannot_inherit:
        raise ValueError(f"--env {inherited[0]} without a value: {target.cannot_inherit}")
    check_environment({**environment, **{name: _value_here(name) for name in inherited}})
    if options.detect_seconds < 10:
        raise ValueError(
            f"--detect-seconds {options.detect_seconds}: a busy host may be silent for some seconds; at least 10"
        )
    hosts: tuple[Host, ...] = ()
    if target.places == "hosts":
        hosts = parse_hosts(options.hosts) if options.hosts else read_hostfile(options.hostfile)
    nodes, ranks_per_node = getattr(options, "nodes", 1), getattr(options, "ranks_per_node", 1)
    if nodes < 1 or ranks_per_node < 1:
        raise ValueError(f"--nodes {nodes} and --ranks-per-node {ranks_per_node} must be at least 1")
    job = Job(
        rendezvous=target.engines()[options.engine] if "engine" in options else target.rendezvous[0],
        program=tuple(options.program),
        python=options.python,
        directory=options.directory.absolute(),
        hosts=hosts,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_rank=0 if getattr(options, "cpu", False) else 1,
        environment=environment,
        inherited=inherited,
        detect_seconds=options.detect_seconds,
    )
    return target.plan(job, profile, options)


def _variables(pairs: Sequence[str], profile: Profile) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return variables with a value, and names of those without; the last counts."""
    chosen: dict[str, str | None] = dict(profile.environment)
    for pair in pairs:
        name, equals, value = pair.partition("=")
        chosen[name] = value if equals else None
    return (
        {name: value for name, value in chosen.items() if value is not None},
        tuple(sorted(name for name, value in chosen.items() if value is None)),
    )


def _value_here(name: str) -> str:
    value = os.environ.get(name, "")
    if not value and is_variable(name):
        raise ValueError(
            f"--env {name} hands on the value that {name} has here, and it has none: export {name} first, or "
            "give NAME=VALUE"
        )
    return value


def _execute(plan: Plan, directory: Path) -> int:
    for path, content in plan.files.items():
        # Of a secret's kind, all of them: they hold the values of --env.
        files.write_text(path, content, private=True, executable=is_script(content))
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)  # noqa: T201
    try:
        return run_watched(
            plan.command,
            plan.failure_text,
            directory=directory,
            environment=plan.environment,
            own_group=plan.own_group,
        )
    except FileNotFoundError:
        raise ValueError(
            f"{plan.command[0]} is not on PATH here; --dry-run shows what would be executed"
        ) from None
