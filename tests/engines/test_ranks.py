import pytest

from arsg_dist.engine import Ranks, discover_ranks

TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Ranks(0, 1, 0, "none")),
        (TORCH, Ranks(3, 4, 1, "deepspeed or torchrun")),
        (OPEN_MPI, Ranks(2, 6, 0, "mpirun (Open MPI)")),
        (SRUN, Ranks(5, 8, 1, "srun")),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1"}, Ranks(1, 2, 1, "horovodrun")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Ranks(1, 2, 0, "mpiexec (MPICH, Intel MPI)")),
    ],
)
def test_each_launchers_variables_are_understood(environ: dict[str, str], expected: Ranks) -> None:
    """Catches a launcher under which every process takes itself for rank 0 of 1."""
    assert discover_ranks(environ) == expected


def test_mpirun_in_a_slurm_allocation_uses_mpiruns_ranks() -> None:
    """Catches every rank of a host taking the Slurm rank of the daemon that started it."""
    assert discover_ranks(SRUN | OPEN_MPI).rank == 2


def test_a_batch_script_is_not_a_task() -> None:
    """Catches SLURM_PROCID of a batch script read as one rank of several."""
    assert discover_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Ranks(0, 1, 0, "none")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        (TORCH | {"RANK": "4"}, "RANK=4 does not fit WORLD_SIZE=4"),
        (TORCH | {"WORLD_SIZE": "four"}, "must be integers"),
    ],
)
def test_inconsistent_variables_are_refused(environ: dict[str, str], message: str) -> None:
    """Catches a half-set environment that would start a wrong job."""
    with pytest.raises(ValueError, match=message):
        discover_ranks(environ)
