"""The base iterate under every ZeRO stage and precision, and behind the common engine interface."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import arsg_dist.deepspeed
from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import SingleProcessEngine
from tests.deepspeed import matrix
from tests.deepspeed.jobs.common import weights_of
from tests.deepspeed.visited_cases import Visited, visited_cases
from tests.support import toy
from tests.support.compare import REDUCTION_ORDER, assert_same_weights
from tests.support.results import results_of
from tests.support.turns import parts

# As in the matrix; θ is rounded to the half precision besides.
HALF_PRECISION_ROUNDINGS = 8

ALL = [
    pytest.param(
        ranks,
        selection,
        visited,
        id=f"{ranks}ranks-{'' if selection == 'core' else f'part{selection}-'}{visited}",
        marks=marks,
    )
    for ranks, selection, marks in [
        (2, "core", list[pytest.MarkDecorator]()),
        *((ranks, part, marks) for part, marks in parts() for ranks in (2, 3)),
    ]
    for visited in visited_cases(selection)
]
everywhere = pytest.mark.parametrize(("ranks", "selection", "visited"), ALL)


def result_of(ranks: int, selection: str, visited: Visited) -> dict[str, Any]:
    found: dict[str, Any] = results_of("warm deepspeed", ranks, "deepspeed/jobs/base_iterate", selection)[
        str(visited)
    ]
    return found


@everywhere
@pytest.mark.ranks
def test_theta_is_that_of_a_single_process(ranks: int, selection: str, visited: Visited) -> None:
    """Catches x left in place, another group's settings, a shard's θ in the wrong place, parameters not gathered."""
    theta = {name: weight.float() for name, weight in result_of(ranks, selection, visited)["theta"].items()}
    case = dataclasses.replace(
        visited.case, stage=1, precision=visited.case.precision.removesuffix("-fp32grads")
    )
    half = case.precision != "fp32"
    relative = HALF_PRECISION_ROUNDINGS * torch.finfo(case.dtype).eps if half else REDUCTION_ORDER
    expected = matrix.single_process_weights(case, ranks, at="theta")
    x = matrix.single_process_weights(case, ranks)
    start = {
        name: parameter.detach().to(case.dtype).float()
        for name, parameter in matrix.build_model(case).named_parameters()
    }
    for name in [name for name in start if name.startswith("frozen")]:
        assert torch.equal(theta.pop(name), start.pop(name))
        del expected[name]
    for name in [name for name in start if half and name.startswith("unused")]:
        # Weight decay alone moved them, by less than the rounding to half precision.
        del theta[name], start[name], expected[name]
    # θ is as far from the start as x, and from x, as training goes: the errors of both are measured by the larger.
    far = {
        name: max(start[name], x[name], key=lambda other, weight=weight: (weight - other).abs().max().item())
        for name, weight in expected.items()
    }
    for name, weight in expected.items():
        away, scale = ((weight - other[name]).abs().max() for other in (x, far))
        assert away > 2 * relative * scale, f"{name}: θ is too near to x for this test to tell them apart"
    assert_same_weights(theta, expected, started_from=far, relative=relative)


@everywhere
@pytest.mark.ranks
def test_x_returns_and_training_goes_on_as_without_visits(
    ranks: int, selection: str, visited: Visited
) -> None:
    """Catches x returned approximately, or not after an exception, or masters and state touched by a visit."""
    result = result_of(ranks, selection, visited)
    assert result["moved before the first step"] == []
    assert result["not restored"] == []
    assert result["not restored after an exception"] == []
    assert result["masters"].keys() == result["straight"].keys()
    for name, master in result["masters"].items():
        assert torch.equal(master, result["straight"][name]), name


@everywhere
@pytest.mark.ranks
def test_the_model_computes_with_theta(ranks: int, selection: str, visited: Visited) -> None:
    """Catches stage 3 fetching parameters that still are x in the forward pass."""
    result = result_of(ranks, selection, visited)
    assert torch.equal(result["outputs"], result["outputs of a plain model"])


@everywhere
@pytest.mark.ranks
def test_training_and_saving_inside_are_refused(ranks: int, selection: str, visited: Visited) -> None:
    """Catches gradients taken at θ, a step from it, θ saved as x, and nesting that would keep θ as x."""
    refused = result_of(ranks, selection, visited)["refused"]
    assert len(refused) == 8
    for name, message in refused.items():
        assert re.match(r"RuntimeError: .*inside base_iterate\(\)", message or ""), f"{name}: {message}"


def test_other_engines_and_optimizers_are_told_so() -> None:
    """Catches an AttributeError, or x passed off as θ."""
    model = torch.nn.Linear(2, 2)
    with (
        pytest.raises(TypeError, match=r"deepspeed\.initialize returns, got Linear"),
        arsg_dist.deepspeed.base_iterate(model),
    ):
        pass
    engine = SingleProcessEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="this optimizer is SGD"), engine.base_iterate():
        pass


def test_the_single_process_engine_visits_theta_and_refuses_training_there(tmp_path: Path) -> None:
    """Catches an engine that saves θ as x, or that stays refusing after the visit."""
    model = toy.build_model()
    engine = SingleProcessEngine(model, ARSG(model.parameters(), **toy.HYPERPARAMETERS))
    inputs, targets = toy.batch(0)

    def update() -> None:
        engine.backward(toy.loss_of(engine.module(inputs), targets))
        engine.step()

    update()
    x = weights_of(model)
    path = save_run(
        CheckpointStore(tmp_path, engine.communicator), 1, engine.state(), {}, engine.communicator
    )
    with engine.base_iterate():
        assert all(not torch.equal(parameter, x[name]) for name, parameter in model.named_parameters())
        for call in (
            update,
            engine.step,
            engine.state,
            lambda: engine.load_state(SavedRun(path)),
            lambda: engine.base_iterate().__enter__(),
        ):
            with pytest.raises(RuntimeError, match=r"inside base_iterate\(\)"):
                call()
    assert all(torch.equal(parameter, x[name]) for name, parameter in model.named_parameters())
    update()
