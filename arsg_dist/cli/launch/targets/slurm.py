"""Write a batch script for Slurm that saves and requeues itself in time."""

import argparse
from typing import ClassVar

from arsg_dist.cli.launch import safe_path, timeouts
from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.targets import script
from arsg_dist.cli.launch.targets.base import Target, rank_environment
from arsg_dist.cli.launch.targets.horovodrun import on_command_lines
from arsg_dist.cli.launch.targets.mpirun import INHERITED, exported, mpirun_options
from arsg_dist.engine.job import PREEMPTED

SCRIPT = "arsg_job.sbatch"


class Slurm(Target):
    """`sbatch` of a script; the script is left in the working directory, for reading and changing."""

    name = "slurm"
    summary = "a Slurm job, one srun task per GPU; requeues itself"
    rendezvous = ("torch", "horovod")
    places: ClassVar = "nodes"
    restarts = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare options of sbatch."""
        script.add_batch_arguments(parser, "24:00:00")
        parser.add_argument(
            "--through",
            choices=("srun", "mpirun", "horovodrun"),
            default="srun",
            help="what starts the ranks inside the job (default: %(default)s)",
        )
        parser.add_argument("--cpus-per-task", type=int, help="cores per rank")
        parser.add_argument(
            "--signal-seconds",
            type=int,
            default=90,
            help="save and requeue this long before the time limit (default: %(default)s)",
        )
        parser.add_argument(
            "--sbatch",
            action="append",
            default=[],
            metavar="OPTION",
            help="another option of sbatch, for example --sbatch=--constraint=gpu; repeatable",
        )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `sbatch arsg_job.sbatch`."""
        if options.through == "horovodrun" and job.rendezvous != "horovod":
            raise ValueError("--through horovodrun starts Horovod programs only")
        path = job.directory / SCRIPT
        lines = ["#!/bin/bash", *self._directives(job, profile, options), *script.start_lines(job)]
        lines += ['echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"']
        lines += options.setup
        lines += script.exports(rank_environment(job))
        lines += script.first_host('scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1')
        stoppable = options.through != "horovodrun"  # which a signal kills, with the ranks unsaved
        lines += script.program_lines(job, job.rank_command if stoppable else safe_path.rank_command(job))
        lines += ["", *self._step(job, options), "step=$!", *(_SIGNAL if stoppable else ()), *_WAIT]
        lines += [*(_REQUEUE if stoppable else ()), 'exit "$code"']
        given = any(option.startswith("--export") for option in options.sbatch)
        export = ["--export=ALL"] if job.inherited and not given else []
        exposed = job.inherited and options.through == "horovodrun"
        return Plan(
            command=("sbatch", *export, str(path)),
            files={path: "\n".join(lines) + "\n"},
            notes=(on_command_lines(job.inherited),) if exposed else (),
        )

    def _directives(self, job: Job, profile: Profile, options: argparse.Namespace) -> list[str]:
        chosen = [
            f"--job-name={script.word(options.job_name, '--job-name')}",
            f"--nodes={job.nodes}",
            f"--ntasks-per-node={job.ranks_per_node}",
            f"--time={script.word(options.time, '--time')}",
            "--output=%x-%j.out",
            "--open-mode=append",
            "--requeue",  # after the failure of a node
        ]
        if options.through != "horovodrun":
            chosen.append(f"--signal=B:USR1@{options.signal_seconds}")
        if options.account:
            chosen.append(f"--account={script.word(options.account, '--account')}")
        if options.queue:
            chosen.append(f"--partition={script.word(options.queue, '--queue')}")
        if options.cpus_per_task:
            chosen.append(f"--cpus-per-task={options.cpus_per_task}")
        if job.gpus_per_rank:
            # Every rank of a node sees all its GPUs, which NCCL's peer-to-peer needs; LOCAL_RANK picks one.
            chosen.append(f"--gpus-per-node={job.ranks_per_node}")
        extra = [script.word(option, "--sbatch") for option in (*profile.slurm, *options.sbatch)]
        given = {option.partition("=")[0] for option in extra}
        if "--gpus-per-task" in given:
            given.add("--gpus-per-node")
        return [f"#SBATCH {option}" for option in chosen if option.partition("=")[0] not in given] + [
            f"#SBATCH {option}" for option in extra
        ]

    def _step(self, job: Job, options: argparse.Namespace) -> list[str]:
        if options.through == "srun":
            wiring = "pmix" if job.rendezvous == "horovod" else "none"
            return [f'srun --mpi={wiring} --kill-on-bad-exit=1 "${{program[@]}}" &']
        if options.through == "mpirun":
            variables = [
                "MASTER_ADDR",
                "MASTER_PORT",
                *INHERITED,
                *sorted(rank_environment(job)),
                *job.inherited,
            ]
            flags = " ".join([*mpirun_options(as_root=False), *exported(*variables)])
            return [
                *script.exports(timeouts.open_mpi_daemons(job.detect_seconds)),
                'as_root=(); [ "$(id -u)" != 0 ] || as_root=(--allow-run-as-root)',
                f'{script.watched(job, "mpirun")} "${{as_root[@]}}" {flags} -np {job.ranks} "${{program[@]}}" &',
            ]
        return [
            f'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/:{job.ranks_per_node}/" | paste -sd,)',
            *script.exports(safe_path.launcher_environment(job)),
            f'horovodrun --gloo --disable-cache -np {job.ranks} -H "$hosts" "${{program[@]}}" &',
        ]


_WAIT = (
    "trap 'kill -TERM \"$step\"' TERM",
    'wait "$step"',
    'while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal ends a wait',
    'wait "$step"; code=$?',
)
_REQUEUE = (
    f'if [ "$code" = {PREEMPTED} ]; then  # saved, and not done',
    '    echo "saved: requeueing"',
    '    scontrol requeue "$SLURM_JOB_ID" && sleep 60',
    "fi",
)
_SIGNAL = (
    "# Slurm signals this shell before the time limit; srun and mpirun pass it on to the ranks, which save and end.",
    'trap \'echo "time is nearly up: saving"; kill -USR1 "$step"\' USR1',
)
