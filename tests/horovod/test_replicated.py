"""`arsg_dist.horovod.DistributedOptimizer` on real ranks equals one process; plain Horovod does not where noted."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.horovod.jobs.replicated_cases import CASES, Place
from tests.support.compare import REDUCTION_ORDER, assert_same_weights
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

JOBS = {
    "mpirun, 2 ranks": ("mpirun", 2),
    "mpirun, 1 rank": ("mpirun", 1),
    "horovodrun, 2 ranks": ("horovodrun", 2),
    "mpirun, 3 ranks": ("mpirun", 3),
    "mpirun, 4 ranks": ("mpirun", 4),
    "horovodrun, 3 ranks": ("horovodrun", 3),
    "horovodrun, 4 ranks": ("horovodrun", 4),
}
QUICK = 1


def run_job(wrapper: str, launcher: str, ranks: int, directory: Path) -> dict[str, Any]:
    output = directory / "results.pt"
    job = launch(launcher, ranks, "tests/horovod/jobs/replicated_job.py", wrapper, output)
    assert job.code == 0, job.output[-5000:]
    results: dict[str, Any] = torch.load(output, weights_only=True)
    return results


@pytest.fixture(
    scope="module",
    params=[
        name if number < QUICK else pytest.param(name, marks=pytest.mark.turn(number % 3))
        for number, name in enumerate(JOBS)
    ],
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    launcher, ranks = JOBS[request.param]
    return run_job("arsg_dist", launcher, ranks, tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def plain_horovod(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_job("horovod", "mpirun", 2, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", list(CASES))
def test_ranks_end_with_the_weights_of_one_process(results: dict[str, Any], name: str) -> None:
    """Catches gradients that are not averaged, or lost, for a way of training that Horovod's users know."""
    compare(results[name], name)


@pytest.mark.turn(2)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain_horovod != "hangs"])
def test_what_plain_horovod_does(plain_horovod: dict[str, Any], name: str) -> None:
    """Catches a case that shows nothing, and tells when a newer Horovod no longer needs a repair."""
    result = plain_horovod[name]
    if isinstance(result, str):
        found = result
    else:
        try:
            compare(result, name)
            found = "same"
        except AssertionError:
            found = "wrong"
    assert found == CASES[name].plain_horovod


def compare(weights: Any, name: str) -> None:
    case, place = CASES[name], Place()
    assert not isinstance(weights, str), f"{name}: {weights}"
    groups = {key: value for key, value in case.settings.items() if key == "groups"}
    expected = case.run(place, **groups)
    assert_same_weights(
        weights, expected, started_from=place.started_from, relative=case.relative or REDUCTION_ORDER
    )
