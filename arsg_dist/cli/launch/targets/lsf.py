"""Write a batch script for LSF, with mpirun or jsrun. Not run under LSF yet."""

import argparse
import shlex
from typing import ClassVar

from arsg_dist.cli.launch import timeouts
from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.targets import script
from arsg_dist.cli.launch.targets.base import Target, rank_environment
from arsg_dist.cli.launch.targets.mpirun import INHERITED, exported, mpirun_options

SCRIPT = "arsg_job.lsf"


class Lsf(Target):
    """`bsub` of a script. Not horovodrun: under LSF it takes jsrun, by code that fails (horovod 0.28.1, js_run.py)."""

    name = "lsf"
    summary = "an LSF job, by mpirun or jsrun (not run under LSF yet)"
    rendezvous = ("torch", "horovod")
    places: ClassVar = "nodes"
    restarts = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare options of bsub."""
        script.add_batch_arguments(parser, "24:00")
        parser.add_argument(
            "--through",
            choices=("mpirun", "jsrun"),
            default="mpirun",
            help="what starts the ranks inside the job (default: %(default)s)",
        )
        parser.add_argument("--cores-per-rank", type=int, default=1, help="for jsrun (default: %(default)s)")

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `bsub < arsg_job.lsf`."""
        path = job.directory / SCRIPT
        lines = [
            "#!/bin/bash",
            f"#BSUB -J {script.word(options.job_name, '--job-name')}",
            "#BSUB -o %J.out",
            "#BSUB -r",
        ]
        lines += [f"#BSUB -W {script.word(options.time, '--time')}"]
        lines += [f"#BSUB -P {script.word(options.account, '--account')}"] if options.account else []
        lines += [f"#BSUB -q {script.word(options.queue, '--queue')}"] if options.queue else []
        if options.through == "jsrun":
            lines += [f"#BSUB -nnodes {job.nodes}"]
        else:
            lines += [f"#BSUB -n {job.ranks}", f'#BSUB -R "span[ptile={job.ranks_per_node}]"']
            lines += [f'#BSUB -gpu "num={job.ranks_per_node}"'] if job.gpus_per_rank else []
        variables = rank_environment(job)
        lines += [*script.start_lines(job), *options.setup]
        lines += script.exports(variables)
        hosts = "awk '!seen[$1]++ && $1 !~ /batch|login/ {print $1}' \"$LSB_DJOB_HOSTFILE\""
        lines += script.first_host(f"{hosts} | head -n1")
        lines += script.program_lines(job, job.rank_command)
        if options.through == "jsrun":
            lines += [
                f"jsrun -n {job.ranks} -r {job.ranks_per_node} -a 1 -g {job.gpus_per_rank} -c {options.cores_per_rank} "
                '-b none "${program[@]}"'
            ]
        else:
            names = ["MASTER_ADDR", "MASTER_PORT", *INHERITED, *sorted(variables), *job.inherited]
            flags = " ".join([*mpirun_options(as_root=False), *exported(*names)])
            lines += [
                *script.exports(timeouts.open_mpi_daemons(job.detect_seconds)),
                f"hosts=$({hosts} | sed 's/$/:{job.ranks_per_node}/' | paste -sd,)",
                f'{script.watched(job, "mpirun")} {flags} -H "$hosts" -np {job.ranks} "${{program[@]}}"',
            ]
        return Plan(
            command=("sh", "-c", f"bsub{' -env all' if job.inherited else ''} < {shlex.quote(str(path))}"),
            files={path: "\n".join(lines) + "\n"},
            notes=("written from the documentation of LSF; not run under LSF yet",),
        )
