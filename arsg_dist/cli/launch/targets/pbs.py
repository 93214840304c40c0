"""Write a batch script for PBS Pro's mpiexec. Not run under PBS yet."""

import argparse
import re
import shlex
from typing import ClassVar

from arsg_dist.cli.launch.job import Job, Plan
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.targets import script
from arsg_dist.cli.launch.targets.base import Target
from arsg_dist.cli.launch.targets.mpirun import check_mpi_controller
from arsg_dist.engine.hosts import EXPECTED_HOSTS

SCRIPT = "arsg_job.pbs"
_TIME = "24:00:00"


class Pbs(Target):
    """`qsub` of a script that calls mpiexec with one rank per GPU."""

    name = "pbs"
    summary = "a PBS Pro job, by mpiexec (not run under PBS yet)"
    rendezvous = ("torch", "horovod")
    places: ClassVar = "nodes"
    restarts = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare options of qsub."""
        script.add_batch_arguments(parser, _TIME)
        parser.add_argument(
            "--cores-per-rank",
            type=int,
            help="of --nodes (default: the profile's, else 1; loaders want more)",
        )
        parser.add_argument(
            "--resource",
            action="append",
            default=[],
            help="another -l of qsub, which takes the place of the same one here (select=..., place=...); repeatable",
        )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `qsub arsg_job.pbs`."""
        path = job.directory / SCRIPT
        check_mpi_controller(job)
        resources, environment = self._resources(job, profile, options), dict(job.environment)
        if EXPECTED_HOSTS not in job.user.given and not any(
            resource.startswith("place=scatter") for resource in resources
        ):
            environment.pop(EXPECTED_HOSTS, None)  # chunks may share a host
        lines = [
            "#!/bin/bash",
            f"#PBS -N {script.word(options.job_name or script.JOB_NAME, '--job-name')}",
            "#PBS -j oe",
            "#PBS -r y",
        ]
        lines += [f"#PBS -l {resource}" for resource in resources]
        lines += [f"#PBS -A {script.word(options.account, '--account')}"] if options.account else []
        lines += [f"#PBS -q {script.word(options.queue, '--queue')}"] if options.queue else []
        lines += [*script.start_lines(job), *options.setup]
        # qsub hands nothing on by itself.
        lines += [*script.exports(job, environment), *script.of_families(job)]
        lines += script.first_host('head -n1 "$PBS_NODEFILE"', job.user.given)
        lines += script.program_lines(job, job.rank_command)
        mpiexec = ["--envall", *profile.mpiexec]
        mpiexec += ["-n", str(job.ranks), "--ppn", str(job.ranks_per_node)]
        lines += [
            f'{script.watched(job, "mpiexec")} {shlex.join(mpiexec)} --hostfile="$PBS_NODEFILE" "${{program[@]}}"'
        ]
        return Plan(
            command=("qsub", *(["-v", ",".join(job.inherited)] if job.inherited else []), str(path)),
            files={path: "\n".join(lines) + "\n"},
            notes=(
                *script.not_taken(job),
                "written from the documentation of PBS Pro and Polaris; not run under PBS yet",
            ),
        )

    def _resources(self, job: Job, profile: Profile, options: argparse.Namespace) -> list[str]:
        """Return what -l asks for: ours, but of what the profile or, before it, the user names.

        Raises:
            ValueError: the user's own contradict other options.
        """
        cores = options.cores_per_rank or profile.cores_per_rank or 1
        gpus = f":ngpus={job.ranks_per_node * job.gpus_per_rank}" if job.gpus_per_rank else ""
        own = [part for text in options.resource for part in script.word(text, "--resource").split(",")]
        named = dict(part.partition("=")[::2] for part in own)
        walltime = script.word(options.time or _TIME, "--time")
        if options.time and named.get("walltime", options.time) != options.time:
            raise ValueError(f"--time {options.time} contradicts --resource walltime={named['walltime']}")
        if "select" in named:
            counts = [re.match(r"\d*", chunk) for chunk in named["select"].split("+")]
            chunks = sum(int((count and count[0]) or 1) for count in counts)
            if chunks != job.nodes:
                raise ValueError(
                    f"--resource select={named['select']} asks for {chunks} chunks, --nodes {job.nodes} for "
                    f"{job.nodes}: give the same number"
                )
            if options.cores_per_rank:
                raise ValueError(
                    f"--cores-per-rank {options.cores_per_rank} is not used with --resource "
                    f"select={named['select']}: write ncpus= into it"
                )
        ours = {
            "select": f"{job.nodes}:ncpus={job.ranks_per_node * cores}:mpiprocs={job.ranks_per_node}{gpus}",
            "place": "scatter",  # a host for each
            "walltime": walltime,
        }
        of_site = dict(part.partition("=")[::2] for text in profile.pbs for part in text.split(","))
        if "nodes" in named:  # the older form of select and place
            del ours["select"], ours["place"]
        kept = {name: value for name, value in (ours | of_site).items() if name not in named}
        return [*(f"{name}={value}" for name, value in kept.items()), *own]
