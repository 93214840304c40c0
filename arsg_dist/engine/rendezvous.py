"""Bring ranks that know their number together: what torch.distributed asks.

Whoever reaches the place where ranks meet can ask for a rank, and torch trusts it. So the place is not on the network
where all ranks are on one host, is at one address where that is known, and takes every rank once.
"""

import errno
import ipaddress
import itertools
import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import (  # type: ignore[attr-defined]
    DistNetworkError,
    HashStore,
    PrefixStore,
    TCPStore,
)
from torch.distributed.rendezvous import register_rendezvous_handler

from arsg_dist.engine.ranks import Ranks
from arsg_dist.safe_io.documents import parse_json

_LOOPBACK = "127.0.0.1"
_SCHEME = "arsg-dist"


def announce_to_torch(ranks: Ranks, environ: MutableMapping[str, str] | None = None) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT if none did.

    srun and mpirun number the ranks but name no meeting point. DeepSpeed then asks mpi4py, which under srun without
    an MPI answers that each rank is alone. Here it is the first host of the Slurm step, or the host of MPI's rank 0,
    and the host's own loopback where all ranks are on it.

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
            address, port = _LOOPBACK, _free_port()
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
    """Return the longest a collective may take, or None for the default.

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
    """Find the first name in Slurm's compact form of a node list.

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
    address = _LOOPBACK if environ.get("SLURM_STEP_NUM_NODES") == "1" else first_host(nodes)
    return address, 20000 + (int(environ["SLURM_JOB_ID"]) * 16 + step % 16) % 20000


def _mpi_meeting_point(ranks: Ranks) -> tuple[str, int]:
    initialised = "mpi4py.MPI" in sys.modules  # what importing it does
    try:
        from mpi4py import MPI
    except ImportError:
        raise ImportError(
            "MASTER_ADDR and MASTER_PORT are not set and mpi4py, which could tell, is not installed: "
            "set them (mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500), or pip install mpi4py"
        ) from None
    if not initialised:
        _to_finalise.append(MPI)
    world = MPI.COMM_WORLD
    if world.Get_size() != ranks.world_size:
        raise ValueError(
            f"{ranks.launcher} announced {ranks.world_size} ranks but mpi4py sees {world.Get_size()}: it was built for "
            "another MPI; set MASTER_ADDR and MASTER_PORT, or reinstall mpi4py with this MPI's mpicc on PATH"
        )
    on_one_host = world.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == ranks.world_size
    point = bytearray(512)  # a buffer: mpi4py pickles everything else
    if ranks.rank == 0:
        address = _LOOPBACK if on_one_host else socket.gethostname()
        written = json.dumps([address, _free_port()]).encode()
        point[: len(written)] = written
    world.Bcast([point, MPI.BYTE], root=0)
    address, port = parse_json(point.rstrip(b"\0").decode(), "the meeting point of rank 0")
    return str(address), int(port)


_to_finalise: list[Any] = []


def end_mpi() -> None:
    """Finalise MPI where it was initialised here, to ask it for the meeting point. Collective.

    A rank that ends without it makes mpirun report a failed job, whatever the rank's exit code.
    """
    while _to_finalise:
        mpi = _to_finalise.pop()
        if not mpi.Is_finalized():
            mpi.Finalize()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        return int(listener.getsockname()[1])


@cache
def init_method() -> str:
    """Return what to give torch's `init_process_group` as `init_method`, in place of "env://".

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are read as there (`announce_to_torch` sets them), but:

    - A job of one rank listens nowhere.
    - Where MASTER_ADDR is an address and not a name, rank 0 listens at that one only; a name may be known as another
      address on another host.
    - Where it is the loopback, Gloo uses that too, unless GLOO_SOCKET_IFNAME says otherwise.
    - A rank that is there already, or that was started for a job of another size, is a ValueError.
    """
    register_rendezvous_handler(_SCHEME, _handler)  # type: ignore[no-untyped-call]
    return f"{_SCHEME}://"


def _handler(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Any, int, int]]:
    if "GLOO_SOCKET_IFNAME" not in os.environ and _is_loopback(os.environ["MASTER_ADDR"]):
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopback:
            os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]
    store = meet(os.environ, f"{next(_meetings)}", timeout)
    yield store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    raise RuntimeError("ranks that have met cannot meet again")


_meetings = itertools.count()  # all ranks of a process that meets several times do so equally often


def meet(environ: Mapping[str, str], label: str, timeout: timedelta) -> Any:
    """Connect to the other ranks' store, and take this rank's place there.

    Args:
        environ: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and what torchrun sets beside them.
        label: the same on all ranks, and another one at each meeting.
        timeout: how long to wait for the others.

    Raises:
        ValueError: another program has the port, another process this rank, or a rank takes the job for one of another
            size.
        RuntimeError: nobody listens there, or somebody else does.
    """
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if world_size == 1:
        return HashStore()
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    of_agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which listens already
    leads = rank == 0 and not of_agent
    listener = _listener(address, port) if leads else None
    options: dict[str, Any] = {
        "is_master": leads,
        "timeout": timeout,
        "multi_tenant": True,
        "master_listen_fd": None if listener is None else listener.detach(),
    }
    try:
        try:
            store: Any = TCPStore(address, port, world_size, **options)
        except NotImplementedError:  # torch 2.6, whose newer kind of server takes no socket
            store = TCPStore(address, port, world_size, use_libuv=False, **options)
    except DistNetworkError as error:
        if leads and "EADDRINUSE" in str(error):
            raise ValueError(_port_is_taken(address, port)) from None
        raise
    # An agent's store has the places of the start before. Another one is new at each start, of which torchrun's agents
    # do not count alike: those whose ranks did not fail count nothing.
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0") if of_agent else "0"
    store = PrefixStore(f"{_SCHEME} {label} {attempt}", store)
    expected = store.compare_set("world size", "", str(world_size)).decode()
    if expected != str(world_size):
        raise ValueError(
            f"rank {rank} was started as one of {world_size} ranks and meets a job of {expected} at {address}:{port}: "
            "give every job a MASTER_PORT of its own"
        )
    if store.add(f"rank {rank}", 1) > 1:
        raise ValueError(
            f"another process has taken the place of rank {rank} of {world_size} at {address}:{port}: two ranks have "
            "the same number, two jobs the same MASTER_PORT, or somebody who does not belong to the job has joined it"
        )
    return store


def _listener(address: str, port: int) -> socket.socket | None:
    """A socket at this address, if it is one; None leaves it to torch, which listens at all, or says what is wrong.

    Raises:
        ValueError: another program has the port.
    """
    try:
        number = ipaddress.ip_address(_LOOPBACK if address == "localhost" else address)
    except ValueError:
        return None
    listener = socket.socket(socket.AF_INET6 if number.version == 6 else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(number), port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(_port_is_taken(address, port)) from None
        return None
    return listener


def _port_is_taken(address: str, port: int) -> str:
    return (
        f"port {port} of {address}, where the ranks were to meet, is taken by another program: start the job with "
        "another one (deepspeed --master_port PORT, torchrun and arsg-dist launch --master-port PORT, else "
        "MASTER_PORT=PORT)"
    )


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _visible_device(local_rank: int) -> int:
    """With one GPU per task (srun --gpus-per-task=1) every rank sees its own as device 0."""
    import torch

    visible = torch.cuda.device_count()
    return local_rank % visible if visible else local_rank
