"""Diagnose this machine, or every rank of a job: `arsg-dist doctor`.

Alone it looks at this machine. Started as the ranks of a job (mpirun, horovodrun, deepspeed, torchrun, srun) it
compares them and tests their collectives; rank 0 prints.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from arsg_dist.cli.doctor import facts
from arsg_dist.cli.doctor.collectives import (
    Collectives,
    horovod_collectives,
    self_test,
    torch_collectives,
)
from arsg_dist.cli.doctor.findings import Finding, find
from arsg_dist.engine import (
    Communicator,
    JobError,
    Ranks,
    SingleProcessCommunicator,
    TorchCommunicator,
    check_hosts,
    device_of,
    discover_ranks,
    end_process,
    init_method,
)
from arsg_dist.engine.consistency import installed_version
from arsg_dist.safe_io.text import printable_lines

SUMMARY = "say what is installed and pinned and whether the ranks' collectives return what they should"

WRONG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the output's form and the size of the test."""
    parser.add_argument("--json", action="store_true", help="print facts and findings as JSON")
    parser.add_argument(
        "--max-mib", type=float, default=8.0, help="largest message of the self-test (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the report on rank 0. Collective.

    Returns:
        0, or 1 if something is wrong; warnings are not.
    """
    try:
        ranks = discover_ranks()
        device = device_of(ranks)
        communicator, collectives = _connect(ranks, device)
    except JobError as error:  # agreed on
        if ranks.rank == 0:
            print(f"WRONG  {printable_lines(str(error))}", file=sys.stderr, flush=True)  # noqa: T201
        return WRONG
    except (ValueError, ImportError, RuntimeError) as error:
        # Without a working connection every rank can only speak for itself.
        print(f"WRONG  {error}", file=sys.stderr, flush=True)  # noqa: T201
        return WRONG
    of_ranks = communicator.all_gather_object(facts.gather(ranks, device))
    findings = find(of_ranks)
    if collectives is not None:
        errors = self_test(collectives, device, communicator.rank, communicator.world_size, options.max_mib)
        for rank, messages in enumerate(communicator.all_gather_object(errors)):
            findings += [Finding("wrong", f"rank {rank}: {message}") for message in messages]
        findings += collectives.notes(options.max_mib)
    code = WRONG if any(finding.level == "wrong" for finding in findings) else 0
    if communicator.rank == 0:
        (_print_json if options.json else _print_text)(of_ranks, findings)
    if communicator.world_size > 1:
        communicator.close()
        end_process(code)
    return code


def _connect(ranks: Ranks, device: torch.device) -> tuple[Communicator, Collectives | None]:
    if ranks.world_size == 1:
        communicator: Communicator = SingleProcessCommunicator()
        check_hosts(communicator)
        return communicator, None
    if ranks.launcher == "deepspeed or torchrun" or not installed_version("horovod"):
        if "MASTER_ADDR" not in os.environ:
            raise ImportError(
                f"{ranks.launcher} started {ranks.world_size} ranks, which Horovod would connect, and it is not "
                "installed: run launch/setup.sh"
            )
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method(), device_id=None)
        communicator = TorchCommunicator(device)
        check_hosts(communicator)
        return communicator, torch_collectives()
    from arsg_dist.horovod import connect

    return connect(ranks), horovod_collectives()


def _print_json(of_ranks: list[dict[str, Any]], findings: list[Finding]) -> None:
    print(  # noqa: T201
        json.dumps({"ranks": of_ranks, "findings": [vars(finding) for finding in findings]}, indent=2)
    )


def _print_text(of_ranks: list[dict[str, Any]], findings: list[Finding]) -> None:
    lines = []
    say: Callable[[str, Any], None] = lambda name, value: lines.append(f"{name:<20} {value}")  # noqa: E731
    first = of_ranks[0]
    hosts = list(dict.fromkeys(rank["host"] for rank in of_ranks))
    say("ranks", f"{len(of_ranks)} on {len(hosts)} host(s), started by {first['launcher']}")
    for name, version in first["versions"].items():
        say(name, version or "not installed")
    for name, label in facts.LABELS.items():
        say(label, first[name] or "none")
    for rank in of_ranks:
        if rank["local_rank"] == 0:
            addresses = ", ".join(
                f"{name} {' '.join(found)}" for name, found in rank["interfaces"].items() if found
            )
            say(f"host {rank['host']}", f"{addresses}; /dev/shm {rank['shm_free_mib']} MiB free")
    for rank in of_ranks:
        usable = f"{len(rank['cpus'])} of {rank['cpu_count']} logical CPUs, on {rank['cores']} core(s)"
        say(f"rank {rank['rank']} may use", usable)
    lines.append("")
    marks = {"wrong": "WRONG ", "warning": "careful", "good": "good  "}
    lines += [f"{marks[finding.level]} {finding.text}" for finding in findings]
    print(printable_lines("\n".join(lines)), flush=True)  # noqa: T201
