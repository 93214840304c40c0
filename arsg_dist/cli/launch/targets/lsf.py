"""Write a batch script for LSF, with mpirun or jsrun. Not run under LSF yet."""

import argparse
import shlex
from typing import ClassVar

from arsg_dist.cli.launch import timeouts
from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.settings import join
from arsg_dist.cli.launch.targets import script
from arsg_dist.cli.launch.targets.base import Target
from arsg_dist.cli.launch.targets.mpirun import INHERITED, check_mpi_controller, exported, mpirun_options

SCRIPT = "arsg_job.lsf"
_TIME = "24:00"


class Lsf(Target):
    """`bsub` of a script. Not horovodrun: under LSF it takes jsrun, by code that fails (horovod 0.28.1, js_run.py)."""

    name = "lsf"
    summary = "an LSF job, by mpirun or jsrun (not run under LSF yet)"
    rendezvous = ("torch", "horovod")
    places: ClassVar = "nodes"
    restarts = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare options of bsub."""
        script.add_batch_arguments(parser, _TIME)
        parser.add_argument(
            "--through",
            choices=("mpirun", "jsrun"),
            default="mpirun",
            help="what starts the ranks inside the job (default: %(default)s)",
        )
        parser.add_argument("--cores-per-rank", type=int, default=1, help="for jsrun (default: %(default)s)")

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `bsub < arsg_job.lsf`."""
        path, daemons = job.directory / SCRIPT, timeouts.open_mpi_daemons(job.detect_seconds)
        lines = [
            "#!/bin/bash",
            f"#BSUB -J {script.word(options.job_name or script.JOB_NAME, '--job-name')}",
            "#BSUB -o %J.out",
            "#BSUB -r",
        ]
        lines += [f"#BSUB -W {script.word(options.time or _TIME, '--time')}"]
        lines += [f"#BSUB -P {script.word(options.account, '--account')}"] if options.account else []
        lines += [f"#BSUB -q {script.word(options.queue, '--queue')}"] if options.queue else []
        if options.through == "jsrun":
            lines += [f"#BSUB -nnodes {job.nodes}"]
        else:
            lines += [f"#BSUB -n {job.ranks}", f'#BSUB -R "span[ptile={job.ranks_per_node}]"']
            lines += [f'#BSUB -gpu "num={job.ranks_per_node}"'] if job.gpus_per_rank else []
        check_mpi_controller(job)
        lines += [*script.start_lines(job), *options.setup]
        lines += script.exports(job, job.environment)
        hosts = "awk '!seen[$1]++ && $1 !~ /batch|login/ {print $1}' \"$LSB_DJOB_HOSTFILE\""
        lines += script.first_host(f"{hosts} | head -n1", job.user.given)
        lines += script.program_lines(job, job.rank_command)
        if options.through == "jsrun":
            lines += [
                f"jsrun -n {job.ranks} -r {job.ranks_per_node} -a 1 -g {job.gpus_per_rank} -c {options.cores_per_rank} "
                '-b none "${program[@]}"'
            ]
        else:
            names = ["MASTER_ADDR", "MASTER_PORT", *INHERITED, *sorted(job.environment), *job.inherited]
            flags = " ".join([*mpirun_options(False, job.user), *exported(*names)])
            lines += [
                *script.added_exports(job, daemons),
                script.handed_on_by_mpirun(),
                f"hosts=$({hosts} | sed 's/$/:{job.ranks_per_node}/' | paste -sd,)",
                f'{script.watched(job, "mpirun")} {flags} "${{families[@]}}" -H "$hosts" -np {job.ranks} '
                '"${program[@]}"',
            ]
        return Plan(
            command=("sh", "-c", f"bsub{' -env all' if job.inherited else ''} < {shlex.quote(str(path))}"),
            files={path: "\n".join(lines) + "\n"},
            notes=(
                *(() if options.through == "jsrun" else join(daemons, job.user)[1]),
                *script.not_taken(job),
                "written from the documentation of LSF; not run under LSF yet",
            ),
        )
