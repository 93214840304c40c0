"""Diagnose the ranks' facts."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

from arsg_dist.cli.doctor.facts import LABELS

SHM_MIB_PER_RANK = 67  # what DeepSpeed's CPU collectives take, as `arsg_dist.deepspeed` asks for


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        level: "wrong" makes the exit code 1; "warning" costs speed or may go wrong; "good" was checked.
        text: what is the case and, unless good, what to do.
    """

    level: Literal["wrong", "warning", "good"]
    text: str


def find(of_ranks: list[dict[str, Any]]) -> list[Finding]:
    """Diagnose all ranks' facts (`facts.gather`, in rank order)."""
    return [
        *_differences(of_ranks),
        *_installation(of_ranks[0]),
        *_pinning(of_ranks),
        *_shared_memory(of_ranks),
        *_network(of_ranks),
    ]


def _differences(of_ranks: list[dict[str, Any]]) -> list[Finding]:
    findings = []
    compared = {
        **{name: [rank["versions"][name] for rank in of_ranks] for name in of_ranks[0]["versions"]},
        **{
            LABELS[name]: [rank[name] for rank in of_ranks]
            for name in ("cpu_kernel", "horovod_backends", "mpi", "nccl")
        },
    }
    for name, values in compared.items():
        if len(set(values)) > 1:
            ranks_of: dict[str, list[str]] = defaultdict(list)
            for rank, value in enumerate(values):
                ranks_of[value or "none"].append(str(rank))
            listed = "; ".join(f"{value} on rank {', '.join(ranks)}" for value, ranks in ranks_of.items())
            findings.append(Finding("wrong", f"{name} differs: {listed}; install the same everywhere"))
    if not findings and len(of_ranks) > 1:
        findings.append(Finding("good", "every rank has the same versions"))
    return findings


def _installation(first: dict[str, Any]) -> list[Finding]:
    findings = []
    if not first["cpu_kernel"]:
        findings.append(
            Finding(
                "warning",
                "arsg_dist's CPU kernel is not compiled and updates on CPU are slower: install its wheel, "
                "or with a C++ compiler: pip install --no-deps -e . in the checkout",
            )
        )
    if first["horovod_backends"].startswith("cannot be loaded"):
        findings.append(
            Finding("wrong", f"Horovod {first['horovod_backends']}; build it anew with launch/setup.sh")
        )
    elif first["gpus"] and first["horovod_backends"] and "NCCL" not in first["horovod_backends"]:
        findings.append(
            Finding("warning", "Horovod was built without NCCL: run launch/setup.sh with ARSG_GPU=cuda")
        )
    return findings


def _pinning(of_ranks: list[dict[str, Any]]) -> list[Finding]:
    pinned = [
        str(rank["rank"]) for rank in of_ranks if rank["cores"] == 1 and rank["cpu_count"] > len(rank["cpus"])
    ]
    if pinned:
        return [
            Finding(
                "warning",
                f"rank {', '.join(pinned)} and all its threads are pinned to one core: give mpirun --bind-to none "
                "(or srun --cpu-bind=none, deepspeed without --bind_cores_to_rank)",
            )
        ]
    return [Finding("good", "no rank is pinned to a single core")]


def _shared_memory(of_ranks: list[dict[str, Any]]) -> list[Finding]:
    findings = []
    for host, ranks in _by_host(of_ranks).items():
        free, needed = ranks[0]["shm_free_mib"], SHM_MIB_PER_RANK * len(ranks)
        if free < needed:
            findings.append(
                # Others use little of it, and containers have 64 MiB by default.
                Finding(
                    "wrong" if ranks[0]["launcher"].startswith("deepspeed") else "warning",
                    f"{host} has {free} MiB free in /dev/shm and under DeepSpeed its ranks may need {needed}: remove "
                    "what dead jobs left, or give a container --shm-size",
                )
            )
    return findings


def _network(of_ranks: list[dict[str, Any]]) -> list[Finding]:
    hosts = {host: ranks[0] for host, ranks in _by_host(of_ranks).items()}
    findings = []
    hosts_of: dict[tuple[str, str], list[str]] = defaultdict(list)
    for host, rank in hosts.items():
        for name, addresses in rank["interfaces"].items():
            for address in addresses:
                if not address.startswith("127."):
                    hosts_of[name, address].append(host)
    for (name, address), sharing in hosts_of.items():
        if len(sharing) > 1:
            findings.append(
                Finding(
                    "warning",
                    f"interface {name} has the same address {address} on {', '.join(sharing)} and MPI may hang on it: "
                    "give mpirun --mca btl_tcp_if_include and oob_tcp_if_include, horovodrun --network-interface, and "
                    "set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, to the interface that connects the hosts",
                )
            )
    loopback = [host for host, rank in hosts.items() if rank["own_address"].startswith("127.")]
    if loopback:
        findings.append(
            Finding(
                "wrong" if len(hosts) > 1 else "warning",
                f"{', '.join(loopback)}: the own name resolves to {hosts[loopback[0]]['own_address']}, which Gloo "
                "announces to other hosts: put the real address into /etc/hosts in place of it"
                + ("" if len(hosts) > 1 else " before using several hosts"),
            )
        )
    return findings


def _by_host(of_ranks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    hosts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for rank in of_ranks:
        hosts[rank["host"]].append(rank)
    return hosts
