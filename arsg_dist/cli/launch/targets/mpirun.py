"""Start ranks by Open MPI's mpirun over ssh."""

import argparse
import os
from typing import ClassVar

from arsg_dist.cli.launch import timeouts
from arsg_dist.cli.launch.job import Host, Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.supervise import LOST_HOST
from arsg_dist.cli.launch.targets.base import Target, rank_environment

# What ranks on other hosts need of the launcher's own environment, if it is set.
INHERITED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")


def mpirun_options(as_root: bool) -> list[str]:
    """Return what every start needs; else Horovod's thread shares a rank's one core."""
    return [*(["--allow-run-as-root"] if as_root else []), "--bind-to", "none", "--map-by", "slot"]


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
    parser.add_argument(
        "--master-port", type=int, default=29500, help="a free port there (default: %(default)s)"
    )


def meeting_point(job: Job, options: argparse.Namespace) -> dict[str, str]:
    """Return where torch's ranks meet: --master-addr, else the first host.

    Raises:
        ValueError: the address is no host name.
    """
    address = Host(options.master_addr or job.hosts[0].name, 1).name
    return {"MASTER_ADDR": address, "MASTER_PORT": str(options.master_port)}


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
        variables = rank_environment(job)
        if job.rendezvous == "torch":
            variables = meeting_point(job, options) | variables
        set_here = [name for name in INHERITED if name in os.environ]
        command = ["mpirun", *mpirun_options(os.geteuid() == 0), "-np", str(job.ranks)]
        command += ["-H", ",".join(f"{host.name}:{host.slots}" for host in job.hosts)]
        command += ["--wdir", str(job.directory)]
        command += exported(*set_here, *sorted(variables), *job.inherited)
        environment = timeouts.open_mpi_daemons(job.detect_seconds) | variables
        return Plan(command=(*command, *job.rank_command), environment=environment, failure_text=LOST_HOST)
