"""Start ranks by horovodrun over ssh and Gloo, on fixed hosts or elastically."""

import argparse
from typing import ClassVar

from arsg_dist.cli.launch import safe_path
from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.quoting import require_plain
from arsg_dist.cli.launch.settings import agree, require
from arsg_dist.cli.launch.targets.base import Target

_LOOPBACK_NAMES = ("localhost", "127.0.0.1")


def _add_interface(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interface", help="network interface that all hosts have (default: found by horovodrun)"
    )


def interface_options(job: Job, chosen: str | None) -> list[str]:
    """Return horovodrun's options for its network interface.

    Args:
        job: to be started.
        chosen: `--interface`.

    Raises:
        ValueError: variables of the user's say something else.
    """
    require(job.user, "HOROVOD_CONTROLLER", "gloo", "horovodrun --gloo")
    require(job.user, "HOROVOD_CPU_OPERATIONS", "gloo", "horovodrun --gloo")
    interface = agree("--interface", chosen, job.user.find("HOROVOD_GLOO_IFACE"), "")
    if not interface and job.hosts and all(host.name in _LOOPBACK_NAMES for host in job.hosts):
        interface = "lo"
    return ["--network-interface", interface] if interface else []


def rank_command(job: Job) -> tuple[str, ...]:
    """Return what one rank executes under horovodrun, which by itself makes its own interface that of NCCL, too.

    Raises:
        ValueError: the user's interface of NCCL is to be written nowhere.
    """
    name = "NCCL_SOCKET_IFNAME"
    if name in job.inherited:
        raise ValueError(
            f"--env {name} cannot be kept: horovodrun sets it to its own interface; give {name}=VALUE"
        )
    found = job.user.find(name)
    value = job.environment.get(name) or (found.value if found is not None else "")
    command = safe_path.rank_command(job)
    if not value:
        return command
    return (
        ("env", *command[1:3], f"{name}={value}", *command[3:])
        if command[0] == "env"
        else ("env", f"{name}={value}", *command)
    )


def _environment(job: Job) -> dict[str, str]:
    return job.environment | safe_path.launcher_environment(job)


def _notes(job: Job) -> tuple[str, ...]:
    return (on_command_lines(job.inherited),) if job.inherited else ()


def on_command_lines(names: tuple[str, ...]) -> str:
    """Say what horovodrun does to variables that should be secret."""
    return (
        f"horovodrun writes the values of {', '.join(names)}, as of every exported variable, into the ranks' command "
        "lines, which other users of the hosts can read; mpirun does not"
    )


class Horovodrun(Target):
    """horovodrun --gloo. Its --mpi does not work with Open MPI 5, and with 4 is mpirun: use the target mpirun."""

    name = "horovodrun"
    summary = "hosts over ssh, by horovodrun over Gloo"
    rendezvous = ("horovod",)
    places: ClassVar = "hosts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the interface."""
        _add_interface(parser)

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `horovodrun -H node1:4,node2:4 --gloo`."""
        require_plain(str(job.directory), "the working directory", "horovodrun")
        command = ["horovodrun", "-np", str(job.ranks), "--gloo", "--disable-cache"]
        command += ["-H", ",".join(f"{host.name}:{host.slots}" for host in job.hosts)]
        command += interface_options(job, options.interface)
        return Plan(command=(*command, *rank_command(job)), environment=_environment(job), notes=_notes(job))


class ElasticHorovodrun(Target):
    """horovodrun with a script that prints the hosts there are now; a lost host's ranks are taken out."""

    name = "horovodrun-elastic"
    summary = "hosts that come and go, by elastic horovodrun over Gloo"
    rendezvous = ("horovod",)
    fixed_hosts = False
    places: ClassVar = "hosts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the limits."""
        _add_interface(parser)
        parser.add_argument(
            "--min-ranks", type=int, default=1, help="fewer end the job (default: %(default)s)"
        )
        parser.add_argument("--max-ranks", type=int, help="more are not used (default: all slots of --hosts)")
        parser.add_argument(
            "--discovery-script", help="prints lines HOST:SLOTS (default: one that prints --hosts)"
        )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `horovodrun --host-discovery-script`."""
        require_plain(str(job.directory), "the working directory", "horovodrun")
        most = options.max_ranks or job.ranks
        if not 1 <= options.min_ranks <= most:
            raise ValueError(f"--min-ranks {options.min_ranks} must be between 1 and --max-ranks {most}")
        files, notes = {}, []
        script = options.discovery_script
        if script is None:
            path = job.directory / "arsg_discover_hosts.sh"
            script = str(path)
            lines = "".join(f"echo {host.name}:{host.slots}\n" for host in job.hosts)
            files = {path: f"#!/bin/sh\n# The hosts there are now; change it while the job runs.\n{lines}"}
            notes = [f"edit {path} to add or remove hosts while the job runs"]
        command = ["horovodrun", "-np", str(min(job.ranks, most)), "--gloo", "--disable-cache"]
        command += ["--min-np", str(options.min_ranks), "--max-np", str(most)]
        command += ["--host-discovery-script", script]
        network = interface_options(job, options.interface)
        if not network and len(job.hosts) == 1:
            # horovod 0.28.1, gloo_run.py: it would wait for a second host, to find an interface that both have.
            message = "horovodrun, elastic and without --interface, does not start before there are two hosts"
            if options.discovery_script is None:
                raise ValueError(f"{message}: give --interface NAME, that of {job.hosts[0].name}'s network")
            notes.append(message)
        if network[1:] == ["lo"]:
            notes.append(
                "the ranks use the interface lo: for other hosts later, start with their --interface"
            )
        command += network
        return Plan(
            command=(*command, *rank_command(job)),
            environment=_environment(job),
            files=files,
            notes=("the program must use hvd.elastic.run", *notes, *_notes(job)),
        )
