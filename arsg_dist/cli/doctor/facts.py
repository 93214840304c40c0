"""Gather what a process knows of itself and its machine, in plain values."""

import os
import platform
import shutil
import socket
from pathlib import Path
from typing import Any

import torch

import arsg_dist
from arsg_dist.engine import Ranks
from arsg_dist.engine.consistency import installed_version
from arsg_dist.optim.kernels import cpu_library

_PACKAGES = ("torch", "deepspeed", "horovod", "mpi4py")

CPUS = Path("/sys/devices/system/cpu")
LABELS = {
    "cpu_kernel": "CPU kernel",
    "horovod_backends": "Horovod's backends",
    "mpi": "MPI of mpi4py",
    "nccl": "NCCL of torch",
    "gpus": "GPUs",
}
"""How reports call facts that have one value per rank."""


def gather(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Gather everything that the doctor compares, of this rank.

    Args:
        ranks: from `discover_ranks`.
        device: where this rank computes.
    """
    return {
        "rank": ranks.rank,
        "local_rank": ranks.local_rank,
        "launcher": ranks.launcher,
        "host": socket.gethostname(),
        "own_address": _address_of(socket.gethostname()),
        "versions": {
            "python": platform.python_version(),
            "arsg_dist": arsg_dist.__version__,
            **{name: installed_version(name) for name in _PACKAGES},
        },
        "cpu_kernel": "compiled" if cpu_library.PATH.exists() else "",
        "horovod_backends": horovod_backends(),
        "mpi": mpi_library(),
        "nccl": ".".join(map(str, _nccl_version())) if torch.cuda.is_available() else "",
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "device": str(device),
        "interfaces": _interfaces(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "cores": physical_cores(sorted(os.sched_getaffinity(0))),
        "cpu_count": os.cpu_count(),
        "shm_free_mib": shutil.disk_usage("/dev/shm").free >> 20 if os.path.isdir("/dev/shm") else 0,
    }


def horovod_backends() -> str:
    """Name Horovod's backends, as "MPI Gloo NCCL", or say why it cannot be loaded."""
    if not installed_version("horovod"):
        return ""
    try:
        import horovod.torch as hvd
    except (ImportError, OSError) as error:
        return f"cannot be loaded: {str(error).splitlines()[0]}"
    built = {
        "MPI": hvd.mpi_built(),
        "Gloo": hvd.gloo_built(),
        "NCCL": hvd.nccl_built(),
        "CUDA": hvd.cuda_built(),
    }
    return " ".join(name for name, present in built.items() if present)


def mpi_library() -> str:
    """Name the MPI of mpi4py without initialising it; "" if there is none."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, OSError, RuntimeError):
        return ""
    return str(MPI.Get_library_version()).split(",")[0].strip("\0 \n")


def physical_cores(cpus: list[int]) -> int:
    """Count the cores of these logical CPUs: with hyper-threading two are one."""
    siblings = set()
    for cpu in cpus:
        try:
            siblings.add((CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:  # some containers hide it
            siblings.add(str(cpu))
    return len(siblings)


def _interfaces() -> dict[str, list[str]]:
    """Return the IPv4 addresses of each network interface.

    Raises:
        ImportError: psutil is missing; both engines bring it.
    """
    try:
        import psutil
    except ImportError:
        raise ImportError("the doctor needs psutil, which both engines bring: pip install psutil") from None
    return {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }


def _nccl_version() -> tuple[int, ...]:
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return version


def _address_of(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""
