"""Write a batch script for PBS Pro's mpiexec. Not run under PBS yet."""

import argparse
import shlex
from typing import ClassVar

from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.targets import script
from arsg_dist.cli.launch.targets.base import Target, rank_environment

SCRIPT = "arsg_job.pbs"


class Pbs(Target):
    """`qsub` of a script that calls mpiexec with one rank per GPU."""

    name = "pbs"
    summary = "a PBS Pro job, by mpiexec (not run under PBS yet)"
    rendezvous = ("torch", "horovod")
    places: ClassVar = "nodes"
    restarts = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare options of qsub."""
        script.add_batch_arguments(parser, "24:00:00")
        parser.add_argument("--resource", action="append", default=[], help="another -l of qsub; repeatable")

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `qsub arsg_job.pbs`."""
        path = job.directory / SCRIPT
        gpus = f":ngpus={job.ranks_per_node * job.gpus_per_rank}" if job.gpus_per_rank else ""
        resources = [
            f"select={job.nodes}:mpiprocs={job.ranks_per_node}{gpus}",
            f"walltime={script.word(options.time, '--time')}",
            *(script.word(resource, "--resource") for resource in (*profile.pbs, *options.resource)),
        ]
        lines = [
            "#!/bin/bash",
            f"#PBS -N {script.word(options.job_name, '--job-name')}",
            "#PBS -j oe",
            "#PBS -r y",
        ]
        lines += [f"#PBS -l {resource}" for resource in resources]
        lines += [f"#PBS -A {script.word(options.account, '--account')}"] if options.account else []
        lines += [f"#PBS -q {script.word(options.queue, '--queue')}"] if options.queue else []
        lines += [*script.start_lines(job), *options.setup]
        lines += script.exports(rank_environment(job))
        lines += script.first_host('head -n1 "$PBS_NODEFILE"')
        lines += script.program_lines(job, job.rank_command)
        mpiexec = ["--envall", *profile.mpiexec]
        mpiexec += ["-n", str(job.ranks), "--ppn", str(job.ranks_per_node)]
        lines += [
            f'{script.watched(job, "mpiexec")} {shlex.join(mpiexec)} --hostfile="$PBS_NODEFILE" "${{program[@]}}"'
        ]
        return Plan(
            command=("qsub", *(["-v", ",".join(job.inherited)] if job.inherited else []), str(path)),
            files={path: "\n".join(lines) + "\n"},
            notes=("written from the documentation of PBS Pro and Polaris; not run under PBS yet",),
        )
