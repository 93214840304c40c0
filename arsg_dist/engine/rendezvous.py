"""Where ranks that only know their number find each other: what torch.distributed wants to be told."""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from datetime import timedelta

from arsg_dist.engine.ranks import Ranks


def announce_to_torch(ranks: Ranks, environ: MutableMapping[str, str] | None = None) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher did not.

    srun and mpirun number the ranks but name no meeting point. DeepSpeed then asks mpi4py, which under srun without
    an MPI answers that each rank is alone. Here it is the first host of the Slurm step, or the host of MPI's rank 0.

    Args:
        ranks: from `discover_ranks`.
        environ: variables to complete, default `os.environ`.

    Raises:
        ValueError: no meeting point can be derived.
        ImportError: mpi4py is needed and not installed.
    """
    environ = os.environ if environ is None else environ
    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        if ranks.world_size == 1:
            address, port = "127.0.0.1", _free_port()
        elif ranks.launcher == "srun":
            address, port = _slurm_meeting_point(environ)
        elif ranks.launcher.startswith("mpi"):
            address, port = _mpi_meeting_point(ranks)
        else:
            raise ValueError(
                f"{ranks.launcher} started {ranks.world_size} ranks but MASTER_ADDR and MASTER_PORT do not say where "
                "they meet: set them to the first rank's host and a free port there"
            )
        environ.setdefault("MASTER_ADDR", address)
        environ.setdefault("MASTER_PORT", str(port))
    environ["RANK"], environ["WORLD_SIZE"] = str(ranks.rank), str(ranks.world_size)
    environ["LOCAL_RANK"] = str(_visible_device(ranks.local_rank))


def collective_timeout(environ: Mapping[str, str] | None = None) -> timedelta | None:
    """The longest a collective may take before the job is given up, or None for the library's default.

    Args:
        environ: variables to read, default `os.environ`; ARSG_COLLECTIVE_SECONDS, which `arsg-dist launch` sets.

    Raises:
        ValueError: it is not a number of seconds above 0.
    """
    text = (os.environ if environ is None else environ).get("ARSG_COLLECTIVE_SECONDS")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"ARSG_COLLECTIVE_SECONDS={text!r} is not a number of seconds above 0")
    return timedelta(seconds=int(text))


def first_host(node_list: str) -> str:
    """The first name in Slurm's compact form, as `scontrol show hostnames` prints it.

    Args:
        node_list: for example "node[08-11,20],login1" or "rack[1-2]n[1-4]".

    Raises:
        ValueError: not of this form.
    """
    depth, end = 0, len(node_list)
    for index, character in enumerate(node_list):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            end = index
            break
    name = re.sub(r"\[([A-Za-z0-9]+)[^\]]*\]", r"\1", node_list[:end])
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"{node_list!r} is no list of Slurm nodes: set MASTER_ADDR to the first rank's host")
    return name


def _slurm_meeting_point(environ: MutableMapping[str, str]) -> tuple[str, int]:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes or "SLURM_JOB_ID" not in environ:
        raise ValueError(
            "SLURM_STEP_NODELIST or SLURM_JOB_ID is missing: set MASTER_ADDR and MASTER_PORT yourself"
        )
    # Steps of one job may share a host, jobs on a shared host differ in their number.
    step = int(environ.get("SLURM_STEP_ID", "0"))
    return first_host(nodes), 20000 + (int(environ["SLURM_JOB_ID"]) * 16 + step % 16) % 20000


def _mpi_meeting_point(ranks: Ranks) -> tuple[str, int]:
    try:
        from mpi4py import MPI
    except ImportError:
        raise ImportError(
            "MASTER_ADDR and MASTER_PORT are not set and mpi4py, which could tell, is not installed: "
            "set them (mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500), or pip install mpi4py"
        ) from None
    world = MPI.COMM_WORLD
    if world.Get_size() != ranks.world_size:
        raise ValueError(
            f"{ranks.launcher} announced {ranks.world_size} ranks but mpi4py sees {world.Get_size()}: it was built for "
            "another MPI; set MASTER_ADDR and MASTER_PORT, or reinstall mpi4py with this MPI's mpicc on PATH"
        )
    point = (socket.gethostname(), _free_port()) if ranks.rank == 0 else None
    address, port = world.bcast(point, root=0)
    return str(address), int(port)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _visible_device(local_rank: int) -> int:
    """With one GPU per task (srun --gpus-per-task=1) every rank sees its own as device 0."""
    import torch

    visible = torch.cuda.device_count()
    return local_rank % visible if visible else local_rank
