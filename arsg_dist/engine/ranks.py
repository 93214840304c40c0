"""Find this process's rank: the one place that reads launchers' variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Hold this process's place in the job, as its launcher announced it.

    Attributes:
        rank: 0 … world_size − 1, unique in the job.
        world_size: number of processes in the job.
        local_rank: 0 … on this host; picks the device.
        launcher: whose variables were found, for messages; "none" for a process started by hand.
    """

    rank: int
    world_size: int
    local_rank: int
    launcher: str


# (launcher, rank, world size, local rank: the first that is set). The most specific first: mpirun inside a Slurm
# allocation sets both its own variables and, inherited from the step that started its daemons, Slurm's, of which only
# its own are right. PALS is the mpiexec of PBS Pro on Cray systems.
_CONVENTIONS = (
    ("deepspeed or torchrun", "RANK", "WORLD_SIZE", ("LOCAL_RANK",)),
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", ("HOROVOD_LOCAL_RANK",)),
    ("mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    (
        "mpiexec (MPICH, Intel MPI, PALS)",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
    ),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",)),
)


def discover_ranks(environ: Mapping[str, str] | None = None) -> Ranks:
    """Read this process's ranks from the environment its launcher made.

    Args:
        environ: variables to read, default `os.environ`.

    Returns:
        The ranks; a process that no launcher started is rank 0 of 1.

    Raises:
        ValueError: a launcher's variables are incomplete, not integers or contradict each other, or two launchers
            announce different jobs, the inner one of a single rank.
    """
    environ = os.environ if environ is None else environ
    announced = [
        _read(environ, launcher, rank_name, size_name, local_names)
        for launcher, rank_name, size_name, local_names in _CONVENTIONS
        # srun: a batch script has SLURM_PROCID without being one of several tasks
        if rank_name in environ and (size_name in environ or launcher != "srun")
    ]
    if not announced:
        if "PMIX_RANK" in environ:
            raise ValueError(
                f"PMIX_RANK={environ['PMIX_RANK']}: this is one of several ranks, but nothing says of how many: "
                "start them through mpirun, srun or jsrun, or set RANK, WORLD_SIZE and LOCAL_RANK"
            )
        return Ranks(0, 1, 0, "none")
    ranks = announced[0]
    for outer in announced[1:]:
        if ranks.world_size == 1 < outer.world_size:
            raise ValueError(
                f"{ranks.launcher} announces 1 rank and {outer.launcher} {outer.world_size}: this would be "
                f"{outer.world_size} jobs of one rank instead of one job; unset the variables of the one that did not "
                "start this process (RANK, WORLD_SIZE, LOCAL_RANK are often left over in a shell)"
            )
    return ranks


def _read(
    environ: Mapping[str, str], launcher: str, rank_name: str, size_name: str, local_names: tuple[str, ...]
) -> Ranks:
    if size_name not in environ:
        raise ValueError(
            f"{rank_name} is set but {size_name} is not: start all ranks through one launcher, or unset {rank_name}"
        )
    local_name = next((name for name in local_names if name in environ), local_names[0])
    try:
        rank, world_size = int(environ[rank_name]), int(environ[size_name])
        local_rank = int(environ.get(local_name, "0"))
    except ValueError:
        values = ", ".join(f"{name}={environ.get(name)!r}" for name in (rank_name, size_name, local_name))
        raise ValueError(f"{values}: these must be integers; the launcher seems to be {launcher}") from None
    if not 0 <= rank < world_size or local_rank < 0:
        raise ValueError(
            f"{rank_name}={rank} does not fit {size_name}={world_size} ({local_name}={local_rank}); "
            f"the launcher seems to be {launcher}"
        )
    return Ranks(rank, world_size, local_rank, launcher)
