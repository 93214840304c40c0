"""A sharded optimizer on real ranks against one process."""

import pytest
import torch

from arsg_dist import RemoteObservation
from arsg_dist.optim.by_name import ELEMENT_WISE
from tests.horovod.jobs.process_sets_job import CHECKS
from tests.horovod.jobs.sharded_cases import CASES, OPTIMIZERS, OTHER_OPTIMIZERS
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

JOB = "tests/horovod/jobs/sharded_job.py"
MPI_AND_GLOO = [  # every turn has both
    pytest.param("mpirun", 2, marks=pytest.mark.turn(0)),
    pytest.param("warm horovodrun", 2, marks=pytest.mark.turn(1)),
    pytest.param("mpirun", 3, marks=pytest.mark.turn(1)),
    pytest.param("warm horovodrun", 3, marks=pytest.mark.turn(2)),
    pytest.param("mpirun", 4, marks=pytest.mark.turn(2)),
    pytest.param("warm horovodrun", 4, marks=pytest.mark.turn(0)),
]
CORE = (
    "groups",
    "remote observation, boosted",
    "adamw",
    "sgd with momentum",
    "bf16 in groups",
    "grad scaler and clipping",
    "clipping",
)


def check(launcher: str, ranks: int, *names: str, shard_group: str = "") -> None:
    arguments = [*names, f"--shard_group={shard_group}"] if shard_group else names
    variables = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"} if shard_group else {}
    job = launch(launcher, ranks, JOB, *arguments, timeout=500, variables=variables)
    assert job.code == 0, job.output[-8000:]
    for name in names or [case.name for case in CASES]:
        assert f"done: {name}\n" in job.output


@pytest.mark.parametrize(("launcher", "ranks"), [("mpirun", 2), ("warm horovodrun", 3)])
def test_sharded_training_equals_one_process(launcher: str, ranks: int) -> None:
    """Catches gradients lost, counted twice or of the wrong rank; shards updated with another's state or settings;
    masters rounded; state that is not divided; gathered state under the wrong parameter."""
    check(launcher, ranks, *CORE)


@pytest.mark.parametrize(
    ("launcher", "ranks"), [pytest.param("alone", 1, marks=pytest.mark.turn(1)), *MPI_AND_GLOO]
)
def test_every_configuration_equals_one_process(launcher: str, ranks: int) -> None:
    """Catches the same for every method, precision, way of accumulating and clipping, scheduler and argument."""
    check(launcher, ranks)


@pytest.mark.turn(2)
def test_every_optimizer_that_is_accepted_equals_one_process() -> None:
    """Catches an optimizer called element-wise that is not, or state of its own that is cut or gathered wrongly."""
    tested = {type(make([torch.zeros(1, requires_grad=True)])) for make in OPTIMIZERS.values()}
    assert tested == {*ELEMENT_WISE, RemoteObservation}
    check("mpirun", 3, *(case.name for case in OTHER_OPTIMIZERS))


@pytest.mark.parametrize(
    ("launcher", "ranks", "shard_group"),
    [
        pytest.param("mpirun", 4, "2", marks=pytest.mark.turn(0)),
        pytest.param("warm horovodrun", 4, "2", marks=pytest.mark.turn(1)),
        pytest.param("horovodrun, two hosts", 4, "node", marks=pytest.mark.turn(2)),
        # One rank per host: every rank has every shard.
        pytest.param("mpirun", 2, "1", marks=pytest.mark.turn(1)),
        pytest.param("horovodrun, two hosts", 2, "node", marks=pytest.mark.turn(0)),
    ],
)
def test_shards_inside_a_node_equal_one_process(launcher: str, ranks: int, shard_group: str) -> None:
    """Catches shards of different nodes that drift apart, a gradient of one node only, and groups of ranks that Horovod
    refuses because it has them."""
    check(launcher, ranks, *CORE, shard_group=shard_group)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("mpirun", marks=pytest.mark.turn(0)),
        pytest.param("warm horovodrun", marks=pytest.mark.turn(2)),
    ],
)
def test_some_ranks_train_together(launcher: str) -> None:
    """Catches an exchange with ranks of another set, an average over the wrong number, a state on the wrong rank, and
    a hang of an optimizer of all ranks after one of some."""
    variables = {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    job = launch(launcher, 4, "tests/horovod/jobs/process_sets_job.py", variables=variables)
    assert job.code == 0, job.output[-8000:]
    assert job.output.count("done: ") == len(CHECKS), job.output
