"""Check the environment of the ranks, where Horovod itself says nothing."""

import os
from collections.abc import Mapping, MutableMapping

import horovod.torch as hvd

from arsg_dist.engine import Ranks, discover_ranks

STALL_CHECK = "HOROVOD_STALL_CHECK_TIME_SECONDS"
STALL_SHUTDOWN = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"
DEFAULT_STALL_CHECK_SECONDS = 60
DEFAULT_STALL_SHUTDOWN_SECONDS = 600

_CONTROLLERS = ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS")
_RENDEZVOUS = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
_MPI_STARTED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def horovod_ranks(environ: Mapping[str, str] | None = None) -> Ranks:
    """Discover this process's ranks as Horovod should see them.

    As `discover_ranks`, but what torchrun and DeepSpeed set is believed last: Horovod does not read it, and schedulers
    leave such variables in the environment of jobs that mpirun or horovodrun starts.

    Args:
        environ: variables to read, default `os.environ`.

    Raises:
        ValueError: a launcher's variables are incomplete, not integers or contradict each other.
    """
    environ = os.environ if environ is None else environ
    ranks = discover_ranks({name: value for name, value in environ.items() if name not in _TORCHRUN})
    return discover_ranks(environ) if ranks.launcher == "none" else ranks


def check_environment(environ: Mapping[str, str] | None = None) -> None:
    """Refuse environments in which Horovod comes up wrong without saying so.

    To be called before `hvd.init()`. Horovod 0.28.1 under mpirun with HOROVOD_CONTROLLER=gloo comes up as jobs of one
    rank each, with HOROVOD_CPU_OPERATIONS=gloo it crashes at the first collective; ranks that torchrun or DeepSpeed
    start do not find each other; a stall shutdown time below the check time is ignored.

    Args:
        environ: variables to read, default `os.environ`.

    Raises:
        ValueError: says which variable to unset, or which launcher to use.
    """
    environ = os.environ if environ is None else environ
    for name in _CONTROLLERS:
        if environ.get(name, "mpi").lower() not in ("mpi", "gloo", "ccl"):
            raise ValueError(f"{name}={environ[name]!r} is not known to Horovod; unset it")
    by_horovodrun = _RENDEZVOUS in environ
    by_mpi = not by_horovodrun and any(name in environ for name in _MPI_STARTED)
    wrong, right = ("gloo", "mpi") if by_mpi else ("mpi", "gloo")
    for name in _CONTROLLERS:
        if (by_mpi or by_horovodrun) and environ.get(name, right).lower() == wrong:
            launcher = "MPI (mpirun, srun)" if by_mpi else "horovodrun --gloo"
            raise ValueError(
                f"{name}={environ[name]} does not fit ranks that were started by {launcher}: Horovod would come up as "
                f"jobs of one rank, or crash; unset {name} (horovodrun sets what it needs itself)"
            )
    ranks = horovod_ranks(environ)
    if ranks.world_size > 1 and not by_mpi and not by_horovodrun and ranks.launcher != "srun":
        raise ValueError(
            f"{ranks.launcher} started {ranks.world_size} ranks, which Horovod cannot connect; "
            "use 'mpirun -np N --bind-to none' or 'horovodrun -np N --gloo'"
        )
    check, shutdown = _seconds(environ, STALL_CHECK), _seconds(environ, STALL_SHUTDOWN)
    if check is not None and shutdown is not None and 0 < shutdown < check:
        raise ValueError(
            f"{STALL_SHUTDOWN}={shutdown} is less than {STALL_CHECK}={check}, and Horovod would ignore it; "
            "make the check time smaller"
        )


def set_stall_defaults(environ: MutableMapping[str, str] | None = None) -> None:
    """Let Horovod end a job in which a rank does not come to a collective.

    To be called before `hvd.init()`. Horovod itself only warns, for ever. Here it warns after 60 s and ends the job
    after 600 s, unless HOROVOD_STALL_CHECK_TIME_SECONDS or HOROVOD_STALL_SHUTDOWN_TIME_SECONDS (0: never) say
    otherwise.

    Args:
        environ: variables to complete, default `os.environ`.
    """
    environ = os.environ if environ is None else environ
    check, shutdown = _seconds(environ, STALL_CHECK), _seconds(environ, STALL_SHUTDOWN)
    if shutdown is None:
        shutdown = max(DEFAULT_STALL_SHUTDOWN_SECONDS, check or 0)
    if check is None:
        check = min(DEFAULT_STALL_CHECK_SECONDS, shutdown or DEFAULT_STALL_CHECK_SECONDS)
    environ[STALL_CHECK], environ[STALL_SHUTDOWN] = str(check), str(shutdown)


def check_world_size(*, whole_job: bool = True) -> None:
    """Compare Horovod's number of ranks with the launcher's.

    To be called after `hvd.init()`. In an elastic job the number changes and what the launcher once announced says
    nothing: no check.

    Args:
        whole_job: Horovod must have every rank; False: it may run on some of them (`hvd.init(comm=...)`), but one rank
            alone among several is refused.

    Raises:
        ValueError: they differ, or Horovod is not initialised.
    """
    size = hvd.size()
    if in_elastic_job():
        return
    ranks = horovod_ranks()
    if size != ranks.world_size and (whole_job or size == 1):
        raise ValueError(
            f"{ranks.launcher} announced {ranks.world_size} ranks but Horovod came up with {size}: "
            "use horovodrun, or mpirun with HOROVOD_CONTROLLER and HOROVOD_CPU_OPERATIONS unset; "
            "'horovodrun --check-build' shows what Horovod was built with"
        )


def in_elastic_job() -> bool:
    """Tell whether ranks may come and go."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def _seconds(environ: Mapping[str, str], name: str) -> int | None:
    if name not in environ:
        return None
    if not environ[name].isdecimal():
        raise ValueError(f"{name}={environ[name]!r} must be a whole number of seconds")
    return int(environ[name])
