"""Write a batch script for Slurm that saves and requeues itself in time."""

import argparse
import re
from typing import ClassVar

from arsg_dist.cli.launch import safe_path, timeouts
from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.quoting import for_bash
from arsg_dist.cli.launch.settings import UserSettings, join, require
from arsg_dist.cli.launch.targets import script
from arsg_dist.cli.launch.targets.base import Target
from arsg_dist.cli.launch.targets.horovodrun import interface_options, on_command_lines, rank_command
from arsg_dist.cli.launch.targets.mpirun import INHERITED, check_mpi_controller, exported, mpirun_options
from arsg_dist.engine.job import PREEMPTED

SCRIPT = "arsg_job.sbatch"
_TIME = "24:00:00"
_SIGNAL_SECONDS = 90

# Option → the variables by which sbatch takes it too (its manual, input environment variables).
_VARIABLES = {
    "--job-name": ("SBATCH_JOB_NAME",),
    "--time": ("SBATCH_TIMELIMIT",),
    "--output": ("SBATCH_OUTPUT",),
    "--open-mode": ("SBATCH_OPEN_MODE",),
    "--requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
    "--signal": ("SBATCH_SIGNAL",),
    "--account": ("SBATCH_ACCOUNT",),
    "--partition": ("SBATCH_PARTITION",),
    "--qos": ("SBATCH_QOS",),
    "--constraint": ("SBATCH_CONSTRAINT",),
    "--reservation": ("SBATCH_RESERVATION",),
    "--exclusive": ("SBATCH_EXCLUSIVE",),
    "--gpus": ("SBATCH_GPUS",),
    "--gpus-per-node": ("SBATCH_GPUS_PER_NODE",),
    "--gpus-per-task": ("SBATCH_GPUS_PER_TASK",),
    "--gpu-bind": ("SBATCH_GPU_BIND",),
    "--cpus-per-task": ("SBATCH_CPUS_PER_TASK",),
    "--mem-per-gpu": ("SBATCH_MEM_PER_GPU",),
}
_SHORT = {
    "-A": "--account",
    "-C": "--constraint",
    "-c": "--cpus-per-task",
    "-G": "--gpus",
    "-J": "--job-name",
    "-N": "--nodes",
    "-n": "--ntasks",
    "-o": "--output",
    "-p": "--partition",
    "-q": "--qos",
    "-t": "--time",
}
_GPUS = ("--gpus", "--gpus-per-task", "--gres")  # another way to ask for GPUs than ours
_SAVES = re.compile(r"(B:)?(SIG)?(USR1|TERM|10|15)(@\d+)?")


class Slurm(Target):
    """`sbatch` of a script; the script is left in the working directory, for reading and changing."""

    name = "slurm"
    summary = "a Slurm job, one srun task per GPU; requeues itself"
    rendezvous = ("torch", "horovod")
    places: ClassVar = "nodes"
    restarts = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare options of sbatch."""
        script.add_batch_arguments(parser, _TIME)
        parser.add_argument(
            "--through",
            choices=("srun", "mpirun", "horovodrun"),
            default="srun",
            help="what starts the ranks inside the job (default: %(default)s)",
        )
        parser.add_argument(
            "--cpus-per-task", type=int, help="cores per rank (default: the site's, mostly 1)"
        )
        parser.add_argument(
            "--signal-seconds",
            type=int,
            help=f"save and requeue this long before the time limit (default: {_SIGNAL_SECONDS})",
        )
        parser.add_argument(
            "--sbatch",
            action="append",
            default=[],
            metavar="OPTION",
            help="another option of sbatch, for example --sbatch=--constraint=gpu, which takes the place of the same "
            "one here; repeatable",
        )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `sbatch arsg_job.sbatch`."""
        if options.through == "horovodrun" and job.rendezvous != "horovod":
            raise ValueError("--through horovodrun starts Horovod programs only")
        if options.through != "horovodrun":
            check_mpi_controller(job)
        path = job.directory / SCRIPT
        directives, notes = self._directives(job, profile, options)
        lines = ["#!/bin/bash", *directives, *script.start_lines(job)]
        lines += ['echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1))"']
        lines += options.setup
        lines += script.exports(job, job.environment)
        lines += script.first_host('scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1', job.user.given)
        stoppable = options.through != "horovodrun"  # which a signal kills, with the ranks unsaved
        lines += script.program_lines(job, job.rank_command if stoppable else rank_command(job))
        lines += ["", *self._step(job, options), "step=$!", *(_SIGNAL if stoppable else ()), *_WAIT]
        lines += [*(_REQUEUE if stoppable else ()), 'exit "$code"']
        wanted = timeouts.open_mpi_daemons(job.detect_seconds) if options.through == "mpirun" else {}
        daemons = join(wanted, job.user)[1]
        exposed = job.inherited and options.through == "horovodrun"
        return Plan(
            command=("sbatch", *_export(job, options), str(path)),
            files={path: "\n".join(lines) + "\n"},
            notes=(
                *notes,
                *daemons,
                *script.not_taken(job),
                *((on_command_lines(job.inherited),) if exposed else ()),
            ),
        )

    def _directives(
        self, job: Job, profile: Profile, options: argparse.Namespace
    ) -> tuple[list[str], tuple[str, ...]]:
        """Return the #SBATCH lines, and what to tell the user.

        sbatch lets its variables (SBATCH_TIMELIMIT) overrule lines of the script. Ours are left out for them; what the
        user has asked for by an option is not overruled silently.
        """
        stoppable = options.through != "horovodrun"
        submitting = UserSettings(here=job.user.here)  # sbatch sees nothing of --env
        ours = {
            "--job-name": script.JOB_NAME,
            "--nodes": str(job.nodes),
            "--ntasks-per-node": str(job.ranks_per_node),
            "--time": _TIME,
            "--output": "%x-%j.out",
            "--open-mode": "append",
            "--requeue": "",  # after the failure of a node
        }
        if stoppable:
            ours["--signal"] = f"B:USR1@{_SIGNAL_SECONDS}"
        if job.gpus_per_rank:
            # Every rank of a node sees all its GPUs, which NCCL's peer-to-peer needs; LOCAL_RANK picks one.
            ours["--gpus-per-node"] = str(job.ranks_per_node)
        asked = {
            "--job-name": options.job_name and script.word(options.job_name, "--job-name"),
            "--time": options.time and script.word(options.time, "--time"),
            "--account": options.account and script.word(options.account, "--account"),
            "--partition": options.queue and script.word(options.queue, "--queue"),
            "--cpus-per-task": options.cpus_per_task and str(options.cpus_per_task),
            "--signal": options.signal_seconds and stoppable and f"B:USR1@{options.signal_seconds}",
        }
        asked = {name: value for name, value in asked.items() if value}
        of_site = dict(_option(script.word(text, "--sbatch")) for text in profile.slurm)
        own = dict(_option(script.word(text, "--sbatch")) for text in options.sbatch)
        for name, value in own.items():
            if name in asked and asked[name] != value:
                raise ValueError(
                    f"--sbatch={name}={value} contradicts {name} {asked[name]}: give one of them"
                )
        _check_size(job, own)
        chosen = ours | of_site | asked | own
        notes = []
        for name, variables in _VARIABLES.items():
            found = submitting.find(*variables)
            if found is None:
                continue
            mine = own.get(name) or asked.get(name)
            if mine is not None and mine != found.value:
                raise ValueError(
                    f"{name} {mine} contradicts {found}, which sbatch would take: unset it, or leave out the option"
                )
            if mine is None and name in chosen:
                left_out = chosen.pop(name)
                if left_out != found.value:
                    notes.append(
                        f"{found} of {found.source} is kept; otherwise it would be {name} {left_out}".rstrip()
                    )
        if "--gpus-per-node" not in own and any(
            name in chosen or submitting.find(*_VARIABLES.get(name, ())) for name in _GPUS
        ):
            chosen.pop("--gpus-per-node", None)
        found = submitting.find("SBATCH_SIGNAL")
        signal = own.get("--signal") or (found.value if found is not None else "")
        if stoppable and signal and not _SAVES.fullmatch(signal):
            raise ValueError(
                f"{'--sbatch=--signal=' + signal if '--signal' in own else found} cannot be kept: the job saves and "
                f"requeues itself on --signal=B:USR1@{_SIGNAL_SECONDS} (any number of seconds before the end; TERM "
                "does, too)"
            )
        lines = [f"#SBATCH {name}={value}" if value else f"#SBATCH {name}" for name, value in chosen.items()]
        return lines, tuple(notes)

    def _step(self, job: Job, options: argparse.Namespace) -> list[str]:
        if options.through == "srun":
            require(job.user, "SLURM_KILL_BAD_EXIT", "1", "a job whose ranks wait for each other")
            return [
                "# Since Slurm 22.05 srun does not take it over from sbatch.",
                'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK='
                '"${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"; fi',
                # Where SBATCH_EXPORT is NONE, srun hands on nothing either, not even what this script exports.
                f'srun --export=ALL --mpi={_wiring(job)} --kill-on-bad-exit=1 "${{program[@]}}" &',
            ]
        if options.through == "mpirun":
            variables = [
                "MASTER_ADDR",
                "MASTER_PORT",
                *INHERITED,
                *sorted(job.environment),
                *job.inherited,
            ]
            flags = " ".join([*mpirun_options(False, job.user), *exported(*variables)])
            return [
                *script.added_exports(job, timeouts.open_mpi_daemons(job.detect_seconds)),
                script.handed_on_by_mpirun(),
                'as_root=(); [ "$(id -u)" != 0 ] || as_root=(--allow-run-as-root)',
                f'{script.watched(job, "mpirun")} "${{as_root[@]}}" {flags} "${{families[@]}}" -np {job.ranks} '
                '"${program[@]}" &',
            ]
        network = "".join(f"{for_bash(word)} " for word in interface_options(job, None))
        return [
            f'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/:{job.ranks_per_node}/" | paste -sd,)',
            *script.fixed_exports(safe_path.launcher_environment(job)),
            f'horovodrun --gloo --disable-cache -np {job.ranks} -H "$hosts" {network}"${{program[@]}}" &',
        ]


def _option(text: str) -> tuple[str, str]:
    """Take --name=value, or -nvalue, apart."""
    if text.startswith("--"):
        name, _, value = text.partition("=")
        return name, value
    return (_SHORT[text[:2]], text[2:].removeprefix("=")) if text[:2] in _SHORT else (text, "")


def _check_size(job: Job, own: dict[str, str]) -> None:
    """Refuse another size of the job than the one its ranks are started for."""
    sizes = {
        "--nodes": ("--nodes", job.nodes),
        "--ntasks-per-node": ("--ranks-per-node", job.ranks_per_node),
        "--ntasks": ("--nodes times --ranks-per-node", job.nodes * job.ranks_per_node),
    }
    for name, (option, number) in sizes.items():
        if own.get(name, str(number)) != str(number):
            raise ValueError(f"--sbatch={name}={own[name]} contradicts {option} {number}: give {option} only")


def _export(job: Job, options: argparse.Namespace) -> list[str]:
    """Return what has sbatch hand on the variables of --env NAME, beside what the user has it hand on."""
    own = next((text.partition("=")[2] for text in options.sbatch if text.startswith("--export=")), None)
    found = UserSettings(here=job.user.here).find("SBATCH_EXPORT")
    own = own if own is not None else found.value if found is not None else "ALL"
    names = own.split(",")
    if not job.inherited:
        return []
    kept = [name for name in names if name not in ("NONE", "NIL")]
    missing = [] if "ALL" in names else [name for name in job.inherited if name not in names]
    return [f"--export={','.join([*kept, *missing])}"]


def _wiring(job: Job) -> str:
    """Return srun's --mpi: the user's SLURM_MPI_TYPE where it does.

    Raises:
        ValueError: it does not.
    """
    found = job.user.find("SLURM_MPI_TYPE")
    if job.rendezvous != "horovod":
        return found.value if found is not None else "none"
    if found is not None and not found.value.startswith("pmix"):
        raise ValueError(
            f"{found} cannot be kept: Horovod under srun needs SLURM_MPI_TYPE=pmix; unset it, or --through mpirun"
        )
    return found.value if found is not None else "pmix"


_WAIT = (
    "trap 'kill -TERM \"$step\"' TERM",
    'wait "$step"',
    'while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal ends a wait',
    'wait "$step"; code=$?',
)
_REQUEUE = (
    f'if [ "$code" = {PREEMPTED} ]; then  # saved, and not done',
    '    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)',
    '    if [ "$state" = RUNNING ]; then',
    '        echo "saved: requeueing"',
    '        scontrol requeue "$SLURM_JOB_ID" && sleep 60',
    "    else  # Slurm would requeue also what its user has just cancelled",
    '        echo "saved: not requeued, the job is ${state:-gone}"',
    "    fi",
    "fi",
)
_SIGNAL = (
    "# Slurm signals this shell before the time limit; srun and mpirun pass it on to the ranks, which save and end.",
    'trap \'echo "time is nearly up: saving"; kill -USR1 "$step"\' USR1',
)
