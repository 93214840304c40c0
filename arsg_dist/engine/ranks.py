"""Which rank is this process? The one place that reads what launchers put into the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job, as its launcher announced it.

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


# (launcher, rank, world size, local rank). The most specific first: mpirun inside a Slurm allocation sets both its
# own variables and, inherited from the step that started its daemons, Slurm's, of which only its own are right.
_CONVENTIONS = (
    ("deepspeed or torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK"),
    ("mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec (MPICH, Intel MPI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)


def discover_ranks(environ: Mapping[str, str] | None = None) -> Ranks:
    """Reads this process's ranks from the environment its launcher made.

    Args:
        environ: variables to read, default `os.environ`.

    Returns:
        The ranks; a process that no launcher started is rank 0 of 1.

    Raises:
        ValueError: a launcher's variables are incomplete, not integers or contradict each other.
    """
    environ = os.environ if environ is None else environ
    for launcher, *names in _CONVENTIONS:
        rank_name, size_name, local_name = names
        if rank_name not in environ or (size_name not in environ and launcher == "srun"):
            continue  # srun: a batch script has SLURM_PROCID without being one of several tasks
        if size_name not in environ:
            raise ValueError(
                f"{rank_name} is set but {size_name} is not: start all ranks through one launcher, or unset {rank_name}"
            )
        try:
            rank, world_size = int(environ[rank_name]), int(environ[size_name])
            local_rank = int(environ.get(local_name, "0"))
        except ValueError:
            values = ", ".join(f"{name}={environ.get(name)!r}" for name in names)
            raise ValueError(
                f"{values}: these must be integers; the launcher seems to be {launcher}"
            ) from None
        if not 0 <= rank < world_size or local_rank < 0:
            raise ValueError(
                f"{rank_name}={rank} does not fit {size_name}={world_size} ({local_name}={local_rank}); "
                f"the launcher seems to be {launcher}"
            )
        return Ranks(rank, world_size, local_rank, launcher)
    return Ranks(0, 1, 0, "none")
