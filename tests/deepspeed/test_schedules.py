"""Schedules of a DeepSpeed config go through the settings that one process goes through, on every ZeRO stage."""

import functools
from typing import Any

import pytest
import torch

from arsg_dist.deepspeed import check_config
from tests.deepspeed import scheduled as schedules
from tests.deepspeed.jobs.common import weights_of
from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.results import results_of

TURNS = {0: [pytest.mark.turn(0)], 1: [], 2: [pytest.mark.turn(1)], 3: [pytest.mark.turn(2)]}
CELLS = [
    pytest.param(name, stage, id=f"{name}, zero{stage}", marks=TURNS[stage])
    for name, case in schedules.CASES.items()
    for stage in case.stages
]
everywhere = pytest.mark.parametrize(("name", "stage"), CELLS)


def result(name: str, stage: int) -> Any:
    return results_of("warm deepspeed", 2, "deepspeed/jobs/schedules", str(stage))[name]


@functools.cache
def oracle(name: str) -> tuple[list[Any], dict[str, torch.Tensor], list[Any]]:
    return schedules.single_process(name)


def assert_same_settings(actual: list[Any], expected: list[Any]) -> None:
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.ranks
@everywhere
def test_every_update_uses_the_settings_of_one_process(name: str, stage: int) -> None:
    """Catches a schedule stepped per micro-batch, per group or at an overflow, a boost that another schedule undoes,
    settings of the wrong group, and a loss that the plateau does not see or sees once per rank."""
    used, weights, after = oracle(name)
    found = result(name, stage)
    assert_same_settings(found["used"], used)
    assert_same_settings(found["after"], after)
    if not schedules.CASES[name].fp16:
        start = weights_of(toy.build_model())
        assert_same_weights(found["weights"], weights, started_from=start)


@pytest.mark.ranks
@everywhere
def test_a_resumed_run_goes_on_with_the_schedule(name: str, stage: int) -> None:
    """Catches a schedule that starts again, boosts again, or forgets the losses it has seen."""
    found = result(name, stage)
    assert_same_settings(found["used, resumed"], found["used"][schedules.SAVE_AT :])
    for key, weight in found["weights"].items():
        assert torch.equal(weight, found["weights, resumed"][key]), key


@pytest.mark.ranks
@everywhere
def test_nothing_is_warned_of(name: str, stage: int) -> None:
    """Catches torch's warning of a wrong order of steps, and boosts without a loss or undone."""
    assert result(name, stage)["warnings"] == []


@pytest.mark.parametrize("name", [name for name in schedules.CASES if name != "callable"])
def test_every_schedule_does_something(name: str) -> None:
    """Catches an oracle whose settings never change: it would show nothing."""
    used, _, _ = oracle(name)
    assert len({str(settings) for settings in used}) > 1


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("one lr for two", "all parameter groups the same lr"),
        ("default lr", "WarmupDecayLR without warmup_max_lr trains with lr 0.001"),
        ("momentum", '"cycle_momentum": false'),
        ("misspelt", r"stepsize of the scheduler StepLR, which has ['gamma', 'last_epoch', 'step_size']"),
        ("missing", "StepLR does not take"),
        ("unfilled", '"auto" in the params of the scheduler WarmupLR'),
        ("metric", "needs a metric on every update"),
    ],
)
def test_schedules_that_cannot_work_are_refused_on_every_rank(case: str, message: str) -> None:
    """Catches a setting that silently becomes another one."""
    text = result("refusals", 1)[case]
    assert text is not None
    assert text.startswith("ValueError: ")
    assert message in text


def _scheduler(kind: Any, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "ARSG"}, "scheduler": {"type": kind, "params": params}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_scheduler("Cosine"), "'Cosine' is not known; there are ObservationBoost, Beta1Warmup, .*WarmupLR"),
        (_scheduler(3), "a scheduler is"),
        (
            {"optimizer": {"type": "ARSG"}, "scheduler": {"type": "StepLR", "step_size": 3}},
            "'type' and 'params'",
        ),
        (_scheduler("LambdaLR"), "needs a function"),
        (_scheduler("OneCycleLR", max_lr=0.1), "cycle_momentum"),
        (_scheduler("CyclicLR", base_lr=0.1, max_lr=0.2), "cycle_momentum"),
        (_scheduler("ObservationBoost", plateau={}), "observe_every"),
        (_scheduler("ObservationBoost", plateau={"patient": 3}), "'plateau' of ObservationBoost"),
        (_scheduler("ObservationBoost", milestones=[3], rescale=[]), "sets rescale"),
        (_scheduler("ChainedScheduler", schedulers=[]), "needs .schedulers."),
        (_scheduler("ChainedScheduler", schedulers=[{"type": "StepLR", "params": {"gama": 1}}]), "sets gama"),
        (
            _scheduler("ChainedScheduler", schedulers=[{"type": "WarmupLR"}, {"type": "StepLR"}]),
            r"WarmupLR sets lr anew on every update, which undoes \['StepLR'\]",
        ),
        (_scheduler("SequentialLR", schedulers=[{"type": "WarmupLR"}]), "WarmupLR sets lr anew"),
        (_scheduler("ChainedScheduler", schedulers=[{"type": "ReduceLROnPlateau"}]), "needs a metric"),
    ],
)
def test_check_config_refuses_such_schedules(config: dict[str, Any], message: str) -> None:
    """Catches a schedule that would only fail once the job runs, or never."""
    with pytest.raises(ValueError, match=message):
        check_config(config)


def test_schedules_of_other_optimizers_are_their_own() -> None:
    """Catches a check that minds what an engine with Adam does."""
    check_config(
        {**_scheduler("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.2), "optimizer": {"type": "AdamW"}}
    )
