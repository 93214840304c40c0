"""Start ranks on this machine."""

import argparse
import os
from importlib.util import find_spec
from typing import ClassVar

from arsg_dist.cli.launch import safe_path
from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.settings import MAPPING
from arsg_dist.cli.launch.targets.base import Target
from arsg_dist.cli.launch.targets.mpirun import (
    add_master_port,
    check_mpi_controller,
    master_port,
    mpirun_options,
)
from arsg_dist.engine.registry import ENGINES


class Local(Target):
    """All ranks on this machine: the deepspeed launcher, torchrun where there is none, or mpirun for Horovod."""

    name = "local"
    summary = "this machine"
    rendezvous = ("torch", "horovod")
    places: ClassVar = "here"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare where torch's ranks meet; Horovod's meet through MPI."""
        add_master_port(parser)

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `deepspeed --num_accelerators N`, `torchrun --nproc-per-node N` or `mpirun -np N`."""
        environment, port, notes = job.environment, 0, tuple[str, ...]()
        if _without_deepspeed(options.engine):
            environment |= safe_path.launcher_environment(job)
            command = [
                *job.python_module,
                "torch.distributed.run",
                "--nproc-per-node",
                str(job.ranks_per_node),
            ]
            port = int(master_port(job, options))
            command += ["--master-port", str(port), *safe_path.script_and_arguments(job)]
            notes = (
                "torchrun starts the ranks, since DeepSpeed is not installed: its exit code for a failure is 1",
            )
        elif job.rendezvous == "torch":
            environment |= safe_path.launcher_environment(job)
            command = [*job.deepspeed_command, "--num_accelerators", str(job.ranks_per_node)]
            port = int(master_port(job, options))
            command += ["--master_port", str(port)]
            command += safe_path.script_and_arguments(job)
        else:
            if options.master_port is not None:
                raise ValueError(
                    f"--master-port {options.master_port}: Horovod's ranks meet through MPI, leave it out"
                )
            check_mpi_controller(job)
            command = ["mpirun", *mpirun_options(os.geteuid() == 0, job.user)]
            command += [] if job.user.find(*MAPPING) else ["--oversubscribe"]
            command += ["-np", str(job.ranks_per_node), *job.rank_command]
        # On Ctrl-C mpirun kills ranks at once. Where it starts them over ssh it may ask the terminal something.
        own_group = job.rendezvous == "horovod"
        return Plan(
            command=tuple(command), environment=environment, notes=notes, own_group=own_group, port=port
        )


def _without_deepspeed(engine: str) -> bool:
    """Say whether this engine's ranks meet through torch, need no DeepSpeed, and none is there to start them."""
    entry = ENGINES[engine]
    return entry.rendezvous == "torch" and not entry.config_file and find_spec("deepspeed") is None
