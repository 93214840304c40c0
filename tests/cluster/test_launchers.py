"""Every launcher, started for real on several hosts: the weights are those of one process."""

from pathlib import Path

import pytest
import torch

from tests.cluster.rehearsal import Cluster
from tests.cluster.starts import start, wait_for_batch_job
from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.launchers import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]

TWO, FOUR = "node1:1,node2:1", "node1:1,node2:1,node3:1,node4:1"


def program(engine: str, tmp_path: Path) -> tuple[list[str], Path]:
    """The toy job; the space and the dollar in its path have to survive every shell on the way."""
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    output = folder / "weights.pt"
    return [str(REPOSITORY / "tests/support/engine_job.py"), engine, str(output), "1", "0"], output


def assert_weights_of_one_process(output: Path, log: str) -> None:
    assert output.exists(), log[-5000:]
    model = toy.build_model()
    assert_same_weights(
        torch.load(output, weights_only=True),
        toy.single_process_weights(),
        started_from={name: parameter.detach().clone() for name, parameter in model.named_parameters()},
    )


@pytest.mark.parametrize(
    ("target", "engine", "options"),
    [
        pytest.param(target, engine, options, marks=pytest.mark.turn(turn))
        for turn, target, engine, options in [
            (0, "deepspeed-pdsh", "deepspeed", ["--hosts", TWO]),
            (1, "deepspeed-openmpi", "deepspeed", ["--hosts", "node1:2,node2:2"]),
            (2, "mpirun", "deepspeed", ["--hosts", TWO, "--engine", "deepspeed"]),
            (0, "mpirun", "horovod", ["--hosts", FOUR, "--engine", "horovod"]),
            (1, "horovodrun", "horovod", ["--hosts", TWO]),
            (2, "horovodrun-elastic", "horovod", ["--hosts", TWO]),
            (0, "torchrun", "ddp", ["--hosts", "node1:2,node2:1"]),
        ]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hosts_over_ssh(
    target: str, engine: str, options: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    """Catches ranks that do not find each other, N jobs of one rank, and arguments lost on the way."""
    command, output = program(engine, tmp_path)
    job = start(cluster, target, *options, program=command, directory=tmp_path).wait(240)
    assert job.code == 0, job.output[-5000:]
    assert_weights_of_one_process(output, job.output)


@pytest.mark.turn(2)
def test_one_command_per_host_without_ssh(cluster: Cluster, tmp_path: Path) -> None:
    """Catches node ranks or the meeting point lost."""
    command, output = program("deepspeed", tmp_path)
    jobs = [
        start(
            cluster, "deepspeed-per-node", "--hosts", TWO, "--node-rank", str(rank),
            program=command, directory=tmp_path, on=f"node{rank + 1}",
        )
        for rank in range(2)
    ]  # fmt: skip
    finished = [job.wait(240) for job in jobs]
    log = "".join(job.output for job in finished)
    assert [job.code for job in finished] == [0, 0], log[-5000:]
    assert_weights_of_one_process(output, log)


@pytest.mark.parametrize(
    ("engine", "through"),
    [
        pytest.param("deepspeed", "srun", marks=pytest.mark.turn(0)),
        pytest.param("horovod", "srun", marks=pytest.mark.turn(1)),
        pytest.param("horovod", "mpirun", marks=pytest.mark.turn(2)),
        pytest.param("horovod", "horovodrun", marks=pytest.mark.turn(0)),
    ],
)
def test_slurm(engine: str, through: str, cluster: Cluster, tmp_path: Path) -> None:
    """Catches a batch script whose ranks are each alone, see another host's GPUs, or have lost their arguments."""
    command, output = program(engine, tmp_path)
    nodes = ["--nodes", "2", "--ranks-per-node", "2" if through == "srun" else "1"]
    options = ["--engine", engine, "--through", through, *nodes, "--time", "10"]
    submitted = start(cluster, "slurm", *options, program=command, directory=tmp_path).wait(120)
    job = wait_for_batch_job(cluster, submitted, tmp_path)
    assert job.code == 0, job.output[-5000:]
    assert "start 1" in job.output
    assert_weights_of_one_process(output, job.output)
