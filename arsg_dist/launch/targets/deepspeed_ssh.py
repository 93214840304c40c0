"""DeepSpeed's own launcher over ssh: its pdsh and openmpi runners, and one command per node without ssh."""

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import ClassVar

from arsg_dist.launch import detection
from arsg_dist.launch.job import Host, Job, Plan, hostfile
from arsg_dist.launch.profiles import Profile
from arsg_dist.launch.quoting import for_pdsh, require_plain
from arsg_dist.launch.targets.base import Target, rank_environment
from arsg_dist.launch.targets.mpirun import mpirun_options

HOSTFILE = "arsg_hosts"
ENVIRONMENT = "arsg_deepspeed_env"


def _add_master(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--master-addr", help="address of the first host (default: what 'hostname -I' says there)"
    )
    parser.add_argument(
        "--master-port", type=int, default=29500, help="a free port there (default: %(default)s)"
    )


def _environment_file(job: Job) -> str:
    """DeepSpeed sends only a few variables to other hosts, and those in this file, which it does not quote well."""
    lines = []
    for name, value in sorted(rank_environment(job).items()):
        if re.search(r"[\"$`\\%!]", value):
            raise ValueError(
                f'{name}={value!r}: DeepSpeed does not carry " $ ` \\ % ! to other hosts; use the target mpirun'
            )
        lines.append(f"{name}={value}\n")
    return "".join(lines)


class _DeepSpeedRunner(Target):
    engines = ("deepspeed",)
    places: ClassVar = "hosts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Where the first rank is."""
        _add_master(parser)

    def _command(
        self, job: Job, options: argparse.Namespace, runner: str
    ) -> tuple[list[str], dict[Path, str]]:
        files = {
            job.directory / HOSTFILE: hostfile(job.hosts),
            job.directory / ENVIRONMENT: _environment_file(job),
        }
        command = [
            "deepspeed",
            "--hostfile",
            str(job.directory / HOSTFILE),
            "--launcher",
            runner,
            "--force_multi",
        ]
        if options.master_addr:
            command += ["--master_addr", Host(options.master_addr, 1).name]
        return [*command, "--master_port", str(options.master_port)], files


class Pdsh(_DeepSpeedRunner):
    """The runner DeepSpeed takes by default. When one rank dies, the ranks on other hosts go on until a timeout."""

    name = "deepspeed-pdsh"
    summary = "hosts over ssh, by DeepSpeed's pdsh runner"

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plans `deepspeed --launcher pdsh`; program and paths are quoted for the remote shell."""
        require_plain(str(job.directory), "the working directory", "DeepSpeed's pdsh runner")
        require_plain(job.python, "the interpreter", "DeepSpeed's pdsh runner")
        command, files = self._command(job, options, "pdsh")
        script, *arguments = job.program
        require_plain(script, "the script", "DeepSpeed's pdsh runner")
        return Plan(
            command=(*command, script, *map(for_pdsh, arguments)),
            environment={
                "PDSH_SSH_ARGS_APPEND": detection.ssh_options(job.detect_seconds),
                "DS_ENV_FILE": str(job.directory / ENVIRONMENT),
            },
            files=files,
        )


class OpenMpiRunner(_DeepSpeedRunner):
    """DeepSpeed's runner over mpirun. It names eth0 as the interface unless told otherwise; here MPI chooses."""

    name = "deepspeed-openmpi"
    summary = "hosts over ssh, by DeepSpeed's openmpi runner"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The interface, which DeepSpeed insists on."""
        super().add_arguments(parser)
        parser.add_argument(
            "--interface", default="0.0.0.0/0", help="network interface or CIDR block for MPI (default: any)"
        )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plans `deepspeed --launcher openmpi`."""
        command, files = self._command(job, options, "openmpi")
        launcher_args = [*mpirun_options(os.geteuid() == 0), "--mca", "btl_tcp_if_include", options.interface]
        launcher_args += ["-x", "PATH"]
        command += [f"--launcher_args={shlex.join(launcher_args)}"]
        return Plan(
            command=(*command, *job.program),
            environment=detection.open_mpi_daemons(job.detect_seconds)
            | {"DS_ENV_FILE": str(job.directory / ENVIRONMENT)},
            files=files,
        )


class PerNode(Target):
    """One command on every node, run by whatever can: a person, a scheduler, a configuration tool."""

    name = "deepspeed-per-node"
    summary = "DeepSpeed without ssh: run on every host, each with its --node-rank"
    engines = ("deepspeed",)
    places: ClassVar = "hosts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Which host this is."""
        _add_master(parser)
        parser.add_argument(
            "--node-rank", type=int, required=True, help="this host's place in --hosts, from 0"
        )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plans `deepspeed --no_ssh --node_rank N`."""
        if not 0 <= options.node_rank < len(job.hosts):
            raise ValueError(
                f"--node-rank {options.node_rank} is not one of the {len(job.hosts)} hosts, 0 to "
                f"{len(job.hosts) - 1}"
            )
        path = job.directory / f"{HOSTFILE}.{options.node_rank}"
        address = Host(options.master_addr or job.hosts[0].name, 1).name
        command = [
            *job.deepspeed_command,
            "--hostfile",
            str(path),
            "--no_ssh",
            "--node_rank",
            str(options.node_rank),
        ]
        command += ["--master_addr", address, "--master_port", str(options.master_port), *job.program]
        return Plan(
            command=tuple(command), environment=rank_environment(job), files={path: hostfile(job.hosts)}
        )
