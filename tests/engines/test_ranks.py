import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from arsg_dist.engine import Ranks, TorchCommunicator, announce_to_torch, communicator, discover_ranks
from arsg_dist.engine.rendezvous import collective_timeout, end_mpi, first_host

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
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Ranks(1, 2, 0, "mpiexec (MPICH, Intel MPI, PALS)")),
        (
            {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1"},
            Ranks(5, 8, 1, "mpiexec (MPICH, Intel MPI, PALS)"),
        ),
        (SRUN | {"PMIX_RANK": "5"}, Ranks(5, 8, 1, "srun")),
    ],
)
def test_each_launchers_variables_are_understood(environ: dict[str, str], expected: Ranks) -> None:
    """Catches a launcher under which every process takes itself for rank 0 of 1."""
    assert discover_ranks(environ) == expected


def test_mpirun_in_a_slurm_allocation_uses_mpiruns_ranks() -> None:
    """Catches every rank of a host taking the Slurm rank of the daemon that started it."""
    assert discover_ranks(SRUN | OPEN_MPI).rank == 2


def test_the_deepspeed_launcher_inside_an_allocation_uses_its_own_ranks() -> None:
    """Catches the refusal of one launcher per node, each with several ranks, started by srun."""
    step = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    assert discover_ranks(step | TORCH) == Ranks(3, 4, 1, "deepspeed or torchrun")


def test_a_batch_script_is_not_a_task() -> None:
    """Catches SLURM_PROCID of a batch script read as one rank of several."""
    assert discover_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Ranks(0, 1, 0, "none")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"PMIX_RANK": "1"}, "nothing says of how many"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, "8 jobs of one rank"),
        (OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "6 jobs of one rank"),
        (TORCH | {"RANK": "4"}, "RANK=4 does not fit WORLD_SIZE=4"),
        (TORCH | {"WORLD_SIZE": "four"}, "must be integers"),
    ],
)
def test_inconsistent_variables_are_refused(environ: dict[str, str], message: str) -> None:
    """Catches a half-set environment that would start a wrong job."""
    with pytest.raises(ValueError, match=message):
        discover_ranks(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-4]", "node1"),
        ("node[08-11,20],login1", "node08"),
        ("login1,node[1-2]", "login1"),
        ("rack[2-3]n[1,4]", "rack2n1"),
        ("a-b.example.org,c", "a-b.example.org"),
    ],
)
def test_the_first_host_of_a_slurm_list_is_found(nodes: str, first: str) -> None:
    """Catches ranks that wait for each other at different hosts."""
    assert first_host(nodes) == first


def test_srun_without_mpi_gets_a_meeting_point() -> None:
    """Catches DeepSpeed asking an MPI that knows of one rank only: N jobs of one rank."""
    step = SRUN | {"SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "1", "SLURM_STEP_NODELIST": "node[3-4]"}
    announce_to_torch(discover_ranks(step), step)
    assert (step["RANK"], step["WORLD_SIZE"], step["LOCAL_RANK"]) == ("5", "8", "1")
    assert step["MASTER_ADDR"] == "node3"
    assert 20000 <= int(step["MASTER_PORT"]) < 40000
    on_one_node = SRUN | {"SLURM_JOB_ID": "4242", "SLURM_STEP_NODELIST": "node3", "SLURM_STEP_NUM_NODES": "1"}
    announce_to_torch(discover_ranks(on_one_node), on_one_node)
    assert on_one_node["MASTER_ADDR"] == "127.0.0.1", "other machines could join"
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    step = SRUN | chosen
    announce_to_torch(discover_ranks(step), step)
    assert step.items() >= chosen.items()


def test_the_time_for_a_collective_is_what_the_launcher_says() -> None:
    """Catches a timeout that is silently not set."""
    assert collective_timeout({}) is None
    assert collective_timeout({"ARSG_COLLECTIVE_SECONDS": "40"}) == timedelta(seconds=40)
    with pytest.raises(ValueError, match="not a number of seconds"):
        collective_timeout({"ARSG_COLLECTIVE_SECONDS": "soon"})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (SRUN, "SLURM_STEP_NODELIST or SLURM_JOB_ID is missing"),
        (SRUN | {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a;b"}, "no list of Slurm nodes"),
        (TORCH, "do not say where they meet"),
    ],
)
def test_without_a_meeting_point_nothing_starts(environ: dict[str, str], message: str) -> None:
    """Catches ranks that each wait alone."""
    environ = dict(environ)
    with pytest.raises(ValueError, match=message):
        announce_to_torch(discover_ranks(environ), environ)


class _Mpi:
    """As much of mpi4py as is asked for a meeting point."""

    COMM_TYPE_SHARED, BYTE = 0, None

    def __init__(self, ranks: int) -> None:
        self.ended = 0
        self.COMM_WORLD = SimpleNamespace(
            Get_size=lambda: ranks,
            Split_type=lambda _: SimpleNamespace(Get_size=lambda: ranks),
            Bcast=lambda *_, root: None,
        )

    def Is_finalized(self) -> bool:
        return self.ended > 0

    def Finalize(self) -> None:
        self.ended += 1


def test_mpi_that_was_only_asked_for_the_meeting_point_is_finalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a good run that mpirun ends with code 1, since its ranks left without MPI's goodbye."""
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    for users_own, ends in ((False, 1), (True, 0)):
        mpi, environ = _Mpi(2), dict[str, str]()
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
        if users_own:  # the user's program goes on with MPI, and ends it
            monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
        announce_to_torch(Ranks(0, 2, 0, "mpirun (Open MPI)"), environ)
        assert environ["MASTER_ADDR"] == "127.0.0.1"
        assert mpi.ended == 0, "not before the communicator is closed"
        communicator = object.__new__(TorchCommunicator)
        monkeypatch.setattr(TorchCommunicator, "barrier", lambda _: None)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        communicator.close()
        assert mpi.ended == ends
        end_mpi()
        assert mpi.ended == ends


@pytest.mark.parametrize("old", [True, False])
def test_groups_of_an_older_torch_end_with_the_process(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a job that hangs at its end: the group's destructor waits for a thread that waits for Python's lock."""
    kept = list[Any]()
    monkeypatch.setattr(communicator, "_OLD_TORCH", old)
    monkeypatch.setattr(communicator, "_kept", kept)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    TorchCommunicator(torch.device("cpu")).close()
    assert not dist.is_initialized()
    assert [group.size() for group in kept if group is not None] == [1] * old
