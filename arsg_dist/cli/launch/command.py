"""Start a program on many machines: `arsg-dist launch TARGET ... -- SCRIPT ...`."""

import argparse
import errno
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from arsg_dist.cli.launch import timeouts
from arsg_dist.cli.launch.job import (
    Host,
    Job,
    Plan,
    check_environment,
    is_script,
    is_variable,
    parse_hosts,
    read_hostfile,
    with_resume_auto,
)
from arsg_dist.cli.launch.profiles import load_profile, profile_names
from arsg_dist.cli.launch.settings import GIVEN, UserSettings, join, read_deepspeed_env
from arsg_dist.cli.launch.supervise import run_watched
from arsg_dist.cli.launch.targets import TARGETS, Target
from arsg_dist.engine.hosts import EXPECTED_HOSTS
from arsg_dist.engine.job import BAD_INPUT
from arsg_dist.engine.registry import ENGINES
from arsg_dist.safe_io import files

SUMMARY = "start a training on this machine, a list of hosts, or through a scheduler"

_DETECT_SECONDS = 60


class _TargetParser(argparse.ArgumentParser):
    """Parse a target's options up to the script; what follows it is the script's."""

    _separated = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse, and refuse a script whose options could be taken for those of the launch."""
        self._separated = "--" in (args or ())
        parsed, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if parsed.program[:1] == ["--"]:
            parsed.program = parsed.program[1:]
        elif any(argument.startswith("-") for argument in parsed.program):
            self.error("options follow the script")
        if not parsed.program:
            self.error("there is no script")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and how the script is told from the options."""
        if not self._separated:
            message += (
                f"\nput -- before the script and its arguments: {self.prog} OPTIONS -- SCRIPT ARGUMENTS"
            )
        super().error(message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one subcommand per target, with common options and its own."""
    targets = parser.add_subparsers(
        dest="target", metavar="TARGET", required=True, parser_class=_TargetParser
    )
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
            "program",
            nargs=argparse.REMAINDER,
            metavar="-- SCRIPT",
            help="what every rank runs, and its arguments",
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
    place = "in the image" if target.in_containers else "on every host"
    parser.add_argument(
        "--python",
        default="python" if target.in_containers else sys.executable,
        help=f"interpreter {place} (default: %(default)s)",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=None if target.in_containers else Path.cwd(),
        help=f"working directory {place} (default: {'its own' if target.in_containers else 'this one'})",
    )
    parser.add_argument(
        "--detect-seconds",
        type=int,
        help="the silent loss of a host ends the job within this time; more if ranks may wait longer "
        f"for each other, for example while one writes a large checkpoint (default: {_DETECT_SECONDS})",
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
        return _execute(plan, _directory(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return BAD_INPUT


def make_plan(options: argparse.Namespace, here: Mapping[str, str] | None = None) -> Plan:
    """Plan what the options ask for.

    Args:
        options: of the command line.
        here: the environment in which the command is called, default `os.environ`.

    Raises:
        ValueError: they contradict each other or what the user has set elsewhere, or the target cannot do it.
        OSError: the hostfile cannot be read.
    """
    here = os.environ if here is None else here
    target = TARGETS[options.target]()
    profile = load_profile(options.profile)
    given, inherited = _given(options.env)
    if inherited and target.cannot_inherit:
        raise ValueError(f"--env {inherited[0]} without a value: {target.cannot_inherit}")
    check_environment({**given, **{name: _value_here(name, here) for name in inherited}})
    if options.detect_seconds is not None and options.detect_seconds < 10:
        raise ValueError(
            f"--detect-seconds {options.detect_seconds}: a busy host may be silent for some seconds; at least 10"
        )
    hosts: tuple[Host, ...] = ()
    if target.places == "hosts":
        hosts = parse_hosts(options.hosts) if options.hosts else read_hostfile(options.hostfile)
    nodes, ranks_per_node = getattr(options, "nodes", 1), getattr(options, "ranks_per_node", 1)
    if nodes < 1 or ranks_per_node < 1:
        raise ValueError(f"--nodes {nodes} and --ranks-per-node {ranks_per_node} must be at least 1")
    if target.in_containers and options.directory is not None and not options.directory.is_absolute():
        raise ValueError(f"--directory {options.directory}: in the image it must begin with /")
    directory = _directory(options)
    job = Job(
        rendezvous=target.engines()[options.engine] if "engine" in options else target.rendezvous[0],
        program=with_resume_auto(tuple(options.program)) if target.restarts else tuple(options.program),
        python=options.python,
        directory=directory,
        container_directory=str(options.directory) if target.in_containers and options.directory else "",
        hosts=hosts,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_rank=0 if getattr(options, "cpu", False) else 1,
        user=UserSettings(
            given=given,
            inherited=inherited,
            file=read_deepspeed_env(directory, here) if target.reads_deepspeed_env else {},
            here={} if target.in_containers else dict(here),
        ),
        detect_seconds=options.detect_seconds or _DETECT_SECONDS,
    )
    of_program = ENGINES.get(job.argument("--engine") or "")
    if of_program is not None and of_program.rendezvous not in (None, job.rendezvous):
        chosen = f"--engine {options.engine}" if "engine" in options else f"the target {target.name}"
        raise ValueError(
            f"{chosen} contradicts the program's own --engine {of_program.name}: its ranks would not meet"
        )
    environment, notes = _rank_environment(job, target, profile.environment, options.detect_seconds)
    plan = target.plan(replace(job, environment=environment), profile, options)
    return replace(plan, notes=tuple(dict.fromkeys((*notes, *plan.notes))))


def _rank_environment(
    job: Job, target: Target, of_site: Mapping[str, str], detect_seconds: int | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return what every rank needs, as `settings.join` makes it, and what to tell the user.

    Raises:
        ValueError: --detect-seconds was given, and a variable of the user's says otherwise.
    """
    of_stack = timeouts.torch_collectives if job.rendezvous == "torch" else timeouts.horovod_ranks
    wanted = of_stack(job.detect_seconds)
    for name, value in wanted.items() if detect_seconds is not None else ():
        found = job.user.find(name)
        if found is not None and found.source != GIVEN and found.value != value:
            raise ValueError(
                f"--detect-seconds {detect_seconds} makes {name}={value}, which contradicts {found}: unset the "
                "variable, or leave out --detect-seconds"
            )
    if target.fixed_hosts and target.places != "here":
        wanted[EXPECTED_HOSTS] = str(len(job.hosts) or job.nodes)
    environment, notes = join(wanted | dict(of_site), job.user)
    return environment | dict(job.user.given), notes


def _directory(options: argparse.Namespace) -> Path:
    """Return where files are written and the command is executed."""
    in_containers = TARGETS[options.target].in_containers
    return Path.cwd() if in_containers else Path(options.directory).absolute()


def _given(pairs: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return variables with a value, and names of those without; the last counts."""
    chosen: dict[str, str | None] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        chosen[name] = value if equals else None
    return (
        {name: value for name, value in chosen.items() if value is not None},
        tuple(sorted(name for name, value in chosen.items() if value is None)),
    )


def _value_here(name: str, here: Mapping[str, str]) -> str:
    value = here.get(name, "")
    if not value and is_variable(name):
        raise ValueError(
            f"--env {name} hands on the value that {name} has here, and it has none: export {name} first, or "
            "give NAME=VALUE"
        )
    return value


def _require_free_port(port: int) -> None:
    """Refuse a port that another program has, before the ranks take seconds to find that out.

    Raises:
        ValueError: somebody listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the ranks: what has just ended is no matter
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"port {port} of this host, where the ranks would meet, is taken by another program, perhaps a "
                    f"training: choose another one with --master-port (now free: {_free_port()})"
                ) from None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _execute(plan: Plan, directory: Path) -> int:
    _require_free_port(plan.port)
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
