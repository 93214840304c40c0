"""Start ranks by DeepSpeed's launcher: its pdsh and openmpi runners, or no ssh."""

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import ClassVar

from arsg_dist.cli.launch import safe_path, timeouts
from arsg_dist.cli.launch.job import Job, Plan, hostfile
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.quoting import for_pdsh, require_plain
from arsg_dist.cli.launch.settings import SSH, UserSettings, agree, join, require
from arsg_dist.cli.launch.supervise import LOST_HOST
from arsg_dist.cli.launch.targets.base import Target
from arsg_dist.cli.launch.targets.mpirun import (
    add_meeting_point,
    exported,
    master_port,
    meeting_point,
    mpirun_options,
)

HOSTFILE = "arsg_hosts"
ENVIRONMENT = "arsg_deepspeed_env"
_INTERFACE = "OMPI_MCA_btl_tcp_if_include"


def _environment_file(variables: dict[str, str], user: UserSettings) -> str:
    """Return the file of variables for other hosts, which DeepSpeed quotes badly.

    It takes the place of the user's own file, whose lines are in it as they are.
    """
    # DeepSpeed has every Python of the job import from the working directory, unless the file says otherwise.
    own_path = {"PYTHONPATH": user.here.get("PYTHONPATH", "")}
    families = {name: value for name, value in user.of_families().items() if "_MCA_" not in name}
    of_user = {name: value for name, value in user.file.items() if variables.get(name, value) == value}
    lines = [f"{name}={value}\n" for name, value in sorted(of_user.items())]
    for name, value in sorted((own_path | families | variables).items()):
        if name in of_user or name in user.inherited:
            continue
        if re.search(r"[\"$`\\%!]", value):
            raise ValueError(
                f'the value of {name}: DeepSpeed does not carry " $ ` \\ % ! to other hosts; use the target mpirun'
            )
        lines.append(f"{name}={value}\n")
    return "".join(lines)


class _DeepSpeedRunner(Target):
    """Plan a start over ssh by DeepSpeed.

    Attributes:
        ssh_variables: by which a user gives the runner's ssh options.
    """

    rendezvous = ("torch",)
    places: ClassVar = "hosts"
    reads_deepspeed_env = True
    ssh_variables: ClassVar[tuple[str, ...]]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare where the first rank is."""
        add_meeting_point(parser)

    def _command(
        self, job: Job, options: argparse.Namespace, runner: str, variables: dict[str, str]
    ) -> tuple[list[str], dict[Path, str]]:
        files = {
            job.directory / HOSTFILE: hostfile(job.hosts),
            job.directory / ENVIRONMENT: _environment_file(variables, job.user),
        }
        command = [
            "deepspeed",
            "--hostfile",
            str(job.directory / HOSTFILE),
            "--launcher",
            runner,
            "--force_multi",
        ]
        own_ssh = job.user.find(*self.ssh_variables)
        if own_ssh is not None:
            # DeepSpeed itself asks the first host for its address, and whether ssh works, by ssh without these options.
            command += ["--no_ssh_check"]
        if options.master_addr or job.user.find("MASTER_ADDR") or own_ssh is not None:
            command += ["--master_addr", meeting_point(job, options)["MASTER_ADDR"]]
        return [*command, "--master_port", master_port(job, options)], files


class Pdsh(_DeepSpeedRunner):
    """The runner DeepSpeed takes by default. When one rank dies, the ranks on other hosts go on until a timeout."""

    name = "deepspeed-pdsh"
    summary = "hosts over ssh, by DeepSpeed's pdsh runner"
    ssh_variables = ("PDSH_SSH_ARGS_APPEND", "PDSH_SSH_ARGS")
    cannot_inherit = (
        "DeepSpeed's pdsh runner writes every value into command lines, which other users of the hosts can read; use "
        "the target mpirun or deepspeed-openmpi, or set the variable in the login shell of every host"
    )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `deepspeed --launcher pdsh`; arguments are quoted for the remote shell."""
        require_plain(str(job.directory), "the working directory", "DeepSpeed's pdsh runner")
        require_plain(job.python, "the interpreter", "DeepSpeed's pdsh runner")
        script, *arguments = safe_path.script_and_arguments(job)
        require_plain(script, "the script", "DeepSpeed's pdsh runner")
        require(job.user, "PDSH_RCMD_TYPE", "ssh", "DeepSpeed's pdsh runner")
        command, files = self._command(
            job, options, "pdsh", safe_path.launcher_environment(job) | job.environment
        )
        ssh, notes = join({"PDSH_SSH_ARGS_APPEND": timeouts.ssh_options(job.detect_seconds)}, job.user)
        return Plan(
            command=(*command, script, *map(for_pdsh, arguments)),
            environment=ssh | {"DS_ENV_FILE": str(job.directory / ENVIRONMENT)},
            files=files,
            notes=notes,
        )


class OpenMpiRunner(_DeepSpeedRunner):
    """DeepSpeed's runner over mpirun, which numbers the ranks; where they meet is told here, so MPI is not needed."""

    name = "deepspeed-openmpi"
    summary = "hosts over ssh, by DeepSpeed's openmpi runner"
    ssh_variables = SSH

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the interface, for programs that use MPI."""
        super().add_arguments(parser)
        parser.add_argument(
            "--interface",
            help=f"network interface for MPI (default: {_INTERFACE}, else eth0, DeepSpeed's default)",
        )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `deepspeed --launcher openmpi`."""
        runner = "DeepSpeed's openmpi runner"
        require(job.user, "OMPI_MCA_btl", "^openib", runner)
        if (of_site := job.environment.get("OMPI_MCA_btl", "^openib")) != "^openib":
            raise ValueError(
                f"--profile {options.profile} has OMPI_MCA_btl={of_site} and {runner} sets it to ^openib: take the "
                "target mpirun"
            )
        interface = agree("--interface", options.interface, job.user.find(_INTERFACE), "")
        excluded = job.user.find("OMPI_MCA_btl_tcp_if_exclude")
        if excluded is not None:
            raise ValueError(
                f"{excluded} cannot be kept: {runner} needs {_INTERFACE}={interface or 'eth0'}, and Open MPI takes "
                f"one of the two; give --interface and unset {excluded.name}, or take the target mpirun"
            )
        command, files = self._command(job, options, "openmpi", job.environment | meeting_point(job, options))
        launcher_args = [*mpirun_options(os.geteuid() == 0, job.user), *exported("PATH", *job.inherited)]
        launcher_args += ["--mca", "btl_tcp_if_include", interface] if interface else []
        command += [f"--launcher_args={shlex.join(launcher_args)}"]
        daemons, notes = join(timeouts.open_mpi_daemons(job.detect_seconds), job.user)
        return Plan(
            command=(*command, *job.program),
            environment=daemons | {"DS_ENV_FILE": str(job.directory / ENVIRONMENT)},
            files=files,
            notes=notes,
            failure_text=LOST_HOST,
        )


class PerNode(Target):
    """One command on every node, run by whatever can: a person, a scheduler, a configuration tool."""

    name = "deepspeed-per-node"
    summary = "DeepSpeed without ssh: run on every host, each with its --node-rank"
    rendezvous = ("torch",)
    places: ClassVar = "hosts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare which host this is."""
        add_meeting_point(parser)
        parser.add_argument(
            "--node-rank", type=int, required=True, help="this host's place in --hosts, from 0"
        )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `deepspeed --no_ssh --node_rank N`."""
        if not 0 <= options.node_rank < len(job.hosts):
            raise ValueError(
                f"--node-rank {options.node_rank} is not one of the {len(job.hosts)} hosts, 0 to "
                f"{len(job.hosts) - 1}"
            )
        path = job.directory / f"{HOSTFILE}.{options.node_rank}"
        point = meeting_point(job, options)
        command = [
            *job.deepspeed_command,
            "--hostfile",
            str(path),
            "--no_ssh",
            "--node_rank",
            str(options.node_rank),
        ]
        command += ["--master_addr", point["MASTER_ADDR"], "--master_port", point["MASTER_PORT"]]
        return Plan(
            command=(*command, *safe_path.script_and_arguments(job)),
            environment=job.environment | safe_path.launcher_environment(job),
            files={path: hostfile(job.hosts)},
        )
