"""Start ranks by Open MPI's mpirun over ssh."""

import argparse
import os
from typing import ClassVar

from arsg_dist.cli.launch import timeouts
from arsg_dist.cli.launch.job import Host, Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.settings import BINDING, MAPPING, UserSettings, agree, join, require
from arsg_dist.cli.launch.supervise import LOST_HOST
from arsg_dist.cli.launch.targets.base import Target

# What ranks on other hosts need of the launcher's own environment, if it is set.
INHERITED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
DEFAULT_PORT = "29500"


def mpirun_options(as_root: bool, user: UserSettings) -> list[str]:
    """Return what every start needs, but what the user has chosen; else Horovod's thread shares a rank's one core."""
    options = ["--allow-run-as-root"] if as_root else []
    options += [] if user.find(*BINDING) else ["--bind-to", "none"]
    return [*options, *([] if user.find(*MAPPING) else ["--map-by", "slot"])]


def check_mpi_controller(job: Job) -> None:
    """Refuse settings with which Horovod does not use the MPI that starts its ranks.

    Raises:
        ValueError: HOROVOD_CONTROLLER or HOROVOD_CPU_OPERATIONS is another one.
    """
    if job.rendezvous == "horovod":
        require(job.user, "HOROVOD_CONTROLLER", "mpi", "Horovod under MPI")
        require(job.user, "HOROVOD_CPU_OPERATIONS", "mpi", "Horovod under MPI", also=("ccl",))


def exported(*names: str) -> list[str]:
    """Return mpirun's options that hand on variables, without their values."""
    # mpirun's own settings travel by themselves.
    own = ("OMPI_MCA_", "PRTE_MCA_")
    return [
        argument for name in dict.fromkeys(names) if not name.startswith(own) for argument in ("-x", name)
    ]


def add_meeting_point(parser: argparse.ArgumentParser) -> None:
    """Declare --master-addr and --master-port."""
    parser.add_argument("--master-addr", help="name or address of the first host that all hosts know")
    add_master_port(parser)


def add_master_port(parser: argparse.ArgumentParser) -> None:
    """Declare --master-port."""
    parser.add_argument(
        "--master-port", help=f"a free port there (default: MASTER_PORT, else {DEFAULT_PORT})"
    )


def master_port(job: Job, options: argparse.Namespace) -> str:
    """Return the port where torch's ranks meet.

    Raises:
        ValueError: it is none, or MASTER_PORT is set to another one.
    """
    port = agree("--master-port", options.master_port, job.user.find("MASTER_PORT"), DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--master-port {port} is not a port: give a number from 1 to 65535")
    return port


def meeting_point(job: Job, options: argparse.Namespace) -> dict[str, str]:
    """Return where torch's ranks meet: --master-addr, MASTER_ADDR, else the first host.

    Raises:
        ValueError: the address is no host name, or option and variable differ.
    """
    address = agree("--master-addr", options.master_addr, job.user.find("MASTER_ADDR"), job.hosts[0].name)
    return {"MASTER_ADDR": Host(address, 1).name, "MASTER_PORT": master_port(job, options)}


class Mpirun(Target):
    """Open MPI 4 or 5 over ssh. Ranks come from MPI; Horovod runs over MPI, DeepSpeed over gloo or NCCL."""

    name = "mpirun"
    summary = "hosts over ssh, by Open MPI's mpirun"
    rendezvous = ("torch", "horovod")
    places: ClassVar = "hosts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare where torch's ranks meet; Horovod's meet through MPI."""
        add_meeting_point(parser)

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `mpirun -H node1:4,node2:4 -x NAME ... python SCRIPT`."""
        check_mpi_controller(job)
        variables = dict(job.environment)
        if job.rendezvous == "torch":
            variables |= meeting_point(job, options)
        set_here = [name for name in INHERITED if name in job.user.here]
        command = ["mpirun", *mpirun_options(os.geteuid() == 0, job.user), "-np", str(job.ranks)]
        command += ["-H", ",".join(f"{host.name}:{host.slots}" for host in job.hosts)]
        command += ["--wdir", str(job.directory)]
        command += exported(*set_here, *sorted(variables), *job.inherited, *job.user.of_families())
        daemons, notes = join(timeouts.open_mpi_daemons(job.detect_seconds), job.user)
        return Plan(
            command=(*command, *job.rank_command),
            environment=daemons | variables,
            notes=notes,
            failure_text=LOST_HOST,
        )
