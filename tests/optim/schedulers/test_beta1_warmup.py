"""β1 warm-up: the horizon grows linearly, ends exactly at the configured value, and survives a resume."""

import copy
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, SequentialLR

from arsg_dist import ARSG, theory
from arsg_dist.optim.schedulers.beta1_warmup import Beta1Warmup
from arsg_dist.optim.schedulers.boost import ObservationBoost

torch.set_num_threads(1)


def arsg(*beta1s: float, **settings: Any) -> ARSG:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "betas": (beta1, 0.99)}
        for beta1 in beta1s or (0.999,)
    ]
    return ARSG(groups, **{"lr": 0.1, "mu": 0.1, **settings})


def beta1_history(optimizer: ARSG, scheduler: Any, steps: int, group: int = 0) -> list[float]:
    seen = [optimizer.param_groups[group]["betas"][0]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[group]["betas"][0])
    return seen


def test_the_horizon_grows_linearly_to_exactly_the_configured_value() -> None:
    """Catches a linear β1 (its horizon explodes at the end), an off-by-one, or 0.999 missed by a rounding."""
    optimizer = arsg()
    history = beta1_history(optimizer, Beta1Warmup(optimizer, 10), 13)
    horizons = [1 / (1 - beta1) for beta1 in history]
    assert horizons[:11] == pytest.approx([10 + 99 * step for step in range(11)], rel=1e-9)
    assert history[10:] == [0.999] * 4
    assert optimizer.param_groups[0]["betas"][1] == 0.99


def test_the_observation_distance_grows_with_the_horizon_at_constant_mu() -> None:
    """Catches a warm-up that also changes μ or lr; η must go linearly from 9μ to its final value."""
    optimizer = arsg()
    warmup = Beta1Warmup(optimizer, 4)
    etas = [theory.observation_distance(beta1, 0.1) for beta1 in beta1_history(optimizer, warmup, 4)]
    assert etas == pytest.approx([0.9 + 24.75 * step for step in range(5)], rel=1e-9)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["mu"]) == (0.1, 0.1)


def test_each_group_has_its_own_target() -> None:
    """Catches the first group's β1 given to all, or a β1 below the start that is raised."""
    optimizer = arsg(0.999, 0.99, 0.5)
    warmup = Beta1Warmup(optimizer, 2)
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.9, 0.9, 0.5]
    optimizer.step()
    warmup.step()
    assert [1 / (1 - group["betas"][0]) for group in optimizer.param_groups] == pytest.approx([505, 55, 2])
    optimizer.step()
    warmup.step()
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.999, 0.99, 0.5]


def test_the_first_moment_fills_sooner() -> None:
    """Catches a horizon that outruns the average: under a constant gradient m must be near it, not 0."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = ARSG([parameter], lr=1e-3, betas=(0.999, 0.99))
    warmup = Beta1Warmup(optimizer, 1_000)
    m = []
    for _ in range(1_000):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        warmup.step()
        m.append(optimizer.state[parameter]["exp_avg"].item())
    assert (m[99], m[999]) == pytest.approx((0.92, 0.99), abs=2e-3)  # 0.095 and 0.63 without a warm-up


def test_after_the_warm_up_beta1_is_the_users() -> None:
    """Catches a scheduler that keeps writing its target over a later change."""
    optimizer = arsg()
    warmup = Beta1Warmup(optimizer, 1)
    beta1_history(optimizer, warmup, 1)
    optimizer.param_groups[0]["betas"] = (0.95, 0.99)
    assert beta1_history(optimizer, warmup, 2) == [0.95] * 3


def test_composes_with_torchs_schedulers() -> None:
    """Catches a warm-up that disturbs lr in a chain, or starts counting before its turn in a sequence."""
    optimizer = arsg()
    chain = ChainedScheduler([LinearLR(optimizer, 0.5, total_iters=2), Beta1Warmup(optimizer, 2)])
    assert beta1_history(optimizer, chain, 2) == pytest.approx([0.9, 1 - 1 / 505, 0.999])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)

    optimizer = arsg()
    parts = [LinearLR(optimizer, 0.5, total_iters=2), Beta1Warmup(optimizer, 2)]
    sequence = SequentialLR(optimizer, parts, [2])
    assert beta1_history(optimizer, sequence, 4) == pytest.approx([0.9] * 3 + [1 - 1 / 505, 0.999])


def test_a_boost_after_the_warm_up_uses_the_final_beta1() -> None:
    """Catches the warm-up leaving something behind that changes the boost's ratio."""
    optimizer = arsg(mu=0.05)
    warmup, boost = Beta1Warmup(optimizer, 3), ObservationBoost(optimizer, [3])
    beta1_history(optimizer, ChainedScheduler([warmup, boost]), 3)
    assert optimizer.param_groups[0]["lr"] == 0.1 * theory.boost_ratio(0.999, 0.05, 0.1)


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize(
    "order", ["optimizer first", "scheduler first", "made after the optimizer was loaded"]
)
def test_resume_is_exact(stop: int, order: str) -> None:
    """Catches a resume that takes the β1 of the moment for the target, or starts the warm-up again."""
    optimizer = arsg()
    uninterrupted = beta1_history(optimizer, Beta1Warmup(optimizer, 4), 6)

    optimizer = arsg()
    warmup = Beta1Warmup(optimizer, 4)
    seen = beta1_history(optimizer, warmup, stop)
    states = copy.deepcopy([optimizer.state_dict(), warmup.state_dict()])
    optimizer = arsg()
    if order == "made after the optimizer was loaded":
        optimizer.load_state_dict(states[0])
    warmup = Beta1Warmup(optimizer, 4)
    if order == "optimizer first":
        optimizer.load_state_dict(states[0])
    warmup.load_state_dict(states[1])
    if order == "scheduler first":
        optimizer.load_state_dict(states[0])
    assert seen[:-1] + beta1_history(optimizer, warmup, 6 - stop) == uninterrupted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": 0}, "warmup_steps"),
        ({"warmup_steps": 2.5}, "warmup_steps"),
        ({"warmup_steps": 2, "start": 1.0}, "start must lie"),
        ({"warmup_steps": 2, "start": 0.999}, "nothing to warm up"),
    ],
)
def test_settings_without_meaning_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Catches a warm-up that silently does nothing."""
    with pytest.raises(ValueError, match=message):
        Beta1Warmup(arsg(), **arguments)


def test_optimizers_it_does_not_fit_are_refused() -> None:
    """Catches bias correction with a β1 that moves: 1 − β1ᵗ would be wrong by half and more."""
    with pytest.raises(ValueError, match="bias correction presumes a constant"):
        Beta1Warmup(arsg(preconditioner="adam"), 5)
    with pytest.raises(ValueError, match="has no 'betas'"):
        Beta1Warmup(SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), 5)
