"""Start ranks on this machine."""

import argparse
import os
from typing import ClassVar

from arsg_dist.cli.launch import safe_path
from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.targets.base import Target, rank_environment
from arsg_dist.cli.launch.targets.mpirun import mpirun_options


class Local(Target):
    """All ranks on this machine: the deepspeed launcher, or mpirun for Horovod."""

    name = "local"
    summary = "this machine"
    rendezvous = ("torch", "horovod")
    places: ClassVar = "here"

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `deepspeed --num_accelerators N` or `mpirun -np N`."""
        environment = rank_environment(job)
        if job.rendezvous == "torch":
            environment |= safe_path.launcher_environment(job)
            command = [*job.deepspeed_command, "--num_accelerators", str(job.ranks_per_node)]
            command += safe_path.script_and_arguments(job)
        else:
            command = ["mpirun", *mpirun_options(os.geteuid() == 0), "--oversubscribe"]
            command += ["-np", str(job.ranks_per_node), *job.rank_command]
        # On Ctrl-C mpirun kills ranks at once. Where it starts them over ssh it may ask the terminal something.
        return Plan(command=tuple(command), environment=environment, own_group=job.rendezvous == "horovod")
