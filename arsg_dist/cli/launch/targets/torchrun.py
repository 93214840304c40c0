"""Start ranks by torch's own torchrun, over ssh."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from arsg_dist.cli.launch import over_ssh, safe_path, timeouts
from arsg_dist.cli.launch.job import Job, Plan, with_resume_auto
from arsg_dist.cli.launch.profiles import Profile
from arsg_dist.cli.launch.targets.base import Target
from arsg_dist.cli.launch.targets.mpirun import INHERITED, add_meeting_point, meeting_point
from arsg_dist.engine.hosts import EXPECTED_HOSTS

FILE = "arsg_torchrun.json"

# All hosts of the job, but for one that joins later, come at about the same time.
_LAST_CALL_SECONDS = 5
_JOIN_SECONDS = 300


class Torchrun(Target):
    """One torchrun on each host, started over ssh from here; the ranks need torch only, and may be started again."""

    name = "torchrun"
    summary = (
        "hosts over ssh, by torch's torchrun; ranks are started again after a failure, hosts come and go"
    )
    rendezvous = ("torch",)
    places: ClassVar = "hosts"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare where the hosts meet, and what is done where one is lost."""
        add_meeting_point(parser)
        parser.add_argument(
            "--max-restarts",
            type=int,
            default=0,
            help="how often the ranks are started again after one has failed (default: %(default)s); arsg-imagenet is "
            "then started with --resume auto, and loses what its last checkpoint lacks",
        )
        parser.add_argument(
            "--min-hosts", type=int, help="go on with as few hosts as these (default: all of --hosts)"
        )
        parser.add_argument(
            "--max-hosts", type=int, help="as many may join later, by --join (default: those of --hosts)"
        )
        parser.add_argument(
            "--join",
            action="store_true",
            help="the hosts join a job that runs, of the same --master-addr, --master-port, --min-hosts, --max-hosts",
        )

    def plan(self, job: Job, profile: Profile, options: argparse.Namespace) -> Plan:
        """Plan `torchrun --nnodes MIN:MAX --rdzv-backend c10d ...` on every host."""
        hosts = len(job.hosts)
        least = options.min_hosts if options.min_hosts is not None else hosts
        most = options.max_hosts if options.max_hosts is not None else max(hosts, least)
        if options.max_restarts < 0:
            raise ValueError(f"--max-restarts {options.max_restarts} must be at least 0")
        if options.join and not (options.master_addr and options.max_hosts and options.min_hosts):
            raise ValueError("--join needs the running job's --master-addr, --min-hosts and --max-hosts")
        if not 1 <= least <= (most if options.join else hosts) or hosts > most:
            raise ValueError(
                f"--min-hosts {least} and --max-hosts {most} do not go with the {hosts} of --hosts: at least 1, and "
                "not more than there are"
            )
        elastic = least != most
        point = meeting_point(job, options)
        environment = dict(job.environment) | safe_path.launcher_environment(job)
        if elastic and job.user.find(EXPECTED_HOSTS) is None:
            environment.pop(EXPECTED_HOSTS, None)
        if elastic or options.max_restarts:
            # With a store that outlives a start, a host that joins waits for an announcement that was made before.
            environment.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
            job = replace(job, program=with_resume_auto(job.program))
        commands = {
            host.name: [
                *job.python_module,
                "torch.distributed.run",
                f"--nnodes={least}:{most}",
                f"--nproc-per-node={host.slots}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={point['MASTER_ADDR']}:{point['MASTER_PORT']}",
                "--rdzv-id=arsg",
                f"--rdzv-conf=is_host={int(index == 0 and not options.join)},join_timeout={_JOIN_SECONDS},"
                f"last_call_timeout={_LAST_CALL_SECONDS}",
                f"--local-addr={host.name}",
                f"--max-restarts={options.max_restarts}",
                *safe_path.script_and_arguments(job),
            ]
            for index, host in enumerate(job.hosts)
        }
        handed_on = [*INHERITED, *environment, *job.inherited, *job.user.of_families()]
        path = job.directory / FILE
        content = {
            "directory": str(job.directory),
            "least": 1 if options.join else least,
            "ssh": ["-o", "BatchMode=yes", *timeouts.ssh_options(job.detect_seconds).split()],
            "variables": sorted(set(handed_on)),
            "hosts": commands,
        }
        return Plan(
            command=(sys.executable, "-P", str(Path(over_ssh.__file__)), str(path)),
            environment=environment,
            files={path: json.dumps(content, indent=2) + "\n"},
            own_group=True,
        )
