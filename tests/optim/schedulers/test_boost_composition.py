"""ObservationBoost beside torch's schedulers: chained, in sequence, interrupted and resumed."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau, SequentialLR

from arsg_dist import ARSG, theory
from arsg_dist.optim.schedulers.beta1_warmup import Beta1Warmup
from arsg_dist.optim.schedulers.boost import ObservationBoost
from arsg_dist.optim.schedulers.loss_plateau import LossPlateau

torch.set_num_threads(1)

RATIO = theory.boost_ratio(0.999, 0.05, 0.1)
STEPS = 12
BOOST_AT = 4

# Schedulers that carry on from the current lr need nothing; the others are named in `rescale`.
RECURSIVE: dict[str, Callable[[ARSG], LRScheduler]] = {
    "StepLR": lambda o: torch_schedulers.StepLR(o, 2),
    "MultiStepLR at the boost": lambda o: torch_schedulers.MultiStepLR(o, [BOOST_AT]),
    "ConstantLR": lambda o: torch_schedulers.ConstantLR(o, 0.1, 6),
    "LinearLR": lambda o: torch_schedulers.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: torch_schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: torch_schedulers.PolynomialLR(o, 20),
    "MultiplicativeLR": lambda o: torch_schedulers.MultiplicativeLR(o, lambda _: 0.8),
    "CosineAnnealingLR": lambda o: torch_schedulers.CosineAnnealingLR(o, 20),
    "OneCycleLR": lambda o: torch_schedulers.OneCycleLR(o, 0.5, total_steps=20, cycle_momentum=False),
}
FROM_BASE: dict[str, Callable[[ARSG], LRScheduler]] = {
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: torch_schedulers.CyclicLR(o, 0.1, 0.4, 3, cycle_momentum=False),
    "CosineAnnealingLR beyond T_max": lambda o: torch_schedulers.CosineAnnealingLR(o, 3),
}


def arsg(**settings: Any) -> ARSG:
    return ARSG([torch.nn.Parameter(torch.ones(2))], **{"lr": 0.1, "mu": 0.05, **settings})


def history(optimizer: ARSG, *schedulers: LRScheduler, steps: int = STEPS) -> list[float]:
    """lr at the start and after each step, with the schedulers stepped in the order given."""
    lrs = [float(optimizer.param_groups[0]["lr"])]
    for _ in range(steps):
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        lrs.append(float(optimizer.param_groups[0]["lr"]))
    return lrs


def scaled_from(lrs: list[float], step: int) -> list[float]:
    return [lr * (RATIO if index >= step else 1.0) for index, lr in enumerate(lrs)]


@pytest.mark.parametrize("boost_first", [True, False])
@pytest.mark.parametrize("name", [*RECURSIVE, *FROM_BASE])
def test_lr_is_the_other_schedulers_times_the_ratio(name: str, boost_first: bool) -> None:
    """Catches a boost that is undone, applied twice, or shifts the other schedule; in either order."""
    make = {**RECURSIVE, **FROM_BASE}[name]
    plain = arsg()
    expected = scaled_from(history(plain, make(plain)), BOOST_AT)

    optimizer = arsg()
    other = make(optimizer)
    boost = ObservationBoost(optimizer, [BOOST_AT], rescale=[other] if name in FROM_BASE else [])
    pair = (boost, other) if boost_first else (other, boost)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert history(optimizer, *pair) == pytest.approx(expected, rel=1e-9)


def test_in_a_chained_scheduler_with_warm_up_and_decay() -> None:
    """Catches a boost that ChainedScheduler does not step, or steps twice."""

    def parts(optimizer: ARSG) -> list[LRScheduler]:
        return [
            torch_schedulers.LinearLR(optimizer, 0.2, total_iters=3),
            torch_schedulers.MultiStepLR(optimizer, [8]),
        ]

    plain = arsg()
    expected = scaled_from(history(plain, ChainedScheduler(parts(plain))), BOOST_AT)
    optimizer = arsg()
    chain = ChainedScheduler([*parts(optimizer), ObservationBoost(optimizer, [BOOST_AT])])
    assert history(optimizer, chain) == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[0]["mu"] == 0.1


def test_after_a_warm_up_in_sequence() -> None:
    """Catches a boost that keeps the warm-up's last lr, or counts milestones from before its own start."""
    optimizer = arsg()
    warmup = torch_schedulers.ConstantLR(optimizer, 0.5, 100)
    boost = ObservationBoost(optimizer, [2])
    lrs = history(optimizer, SequentialLR(optimizer, [warmup, boost], [3]), steps=7)
    assert lrs == pytest.approx([0.05] * 3 + [0.1] * 2 + [0.1 * RATIO] * 3, rel=1e-12)
    assert optimizer.param_groups[0]["mu"] == 0.1


def test_losses_from_before_its_turn_in_a_sequence_do_not_count() -> None:
    """Catches the warm-up's high losses in the first observation, which would put the plateau off."""
    optimizer = arsg()
    plateau = LossPlateau()
    boost = ObservationBoost(optimizer, plateau=plateau)
    warmup = torch_schedulers.ConstantLR(optimizer, 0.5, 100)
    sequence = SequentialLR(optimizer, [warmup, boost], [2])
    for loss in (9.0, 8.0, 1.0):
        optimizer.step()
        boost.record(loss)
        sequence.step()
    assert plateau.average == 1.0


def test_before_a_decay_in_sequence() -> None:
    """Catches the next scheduler of a sequence starting from the base lr of before the boost."""
    optimizer = arsg()
    decay = torch_schedulers.ExponentialLR(optimizer, 0.5)
    boost = ObservationBoost(optimizer, [2], rescale=[decay])
    lrs = history(optimizer, SequentialLR(optimizer, [boost, decay], [4]), steps=6)
    assert lrs == pytest.approx(
        [0.1, 0.1] + [0.1 * RATIO] * 3 + [0.1 * RATIO * 0.5, 0.1 * RATIO * 0.25], rel=1e-12
    )


def test_a_sequence_beside_the_boost_is_rescaled_through_its_members() -> None:
    """Catches `rescale` that does not look into containers: the cosine starts from its base lr."""

    def sequence(optimizer: ARSG) -> SequentialLR:
        warmup = torch_schedulers.LinearLR(optimizer, 0.1, total_iters=6)
        return SequentialLR(optimizer, [warmup, torch_schedulers.CosineAnnealingLR(optimizer, 6)], [6])

    plain = arsg()
    expected = scaled_from(history(plain, sequence(plain)), BOOST_AT)
    optimizer = arsg()
    other = sequence(optimizer)
    boost = ObservationBoost(optimizer, [BOOST_AT], rescale=[other])
    assert history(optimizer, other, boost) == pytest.approx(expected, rel=1e-9)


def test_beside_reduce_on_plateau() -> None:
    """Catches a boost that resets what ReduceLROnPlateau did, or the reverse."""
    optimizer = arsg()
    reducer = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    boost = ObservationBoost(optimizer, [2], rescale=[reducer])
    lrs = []
    for loss in (1.0, 1.0, 1.0, 0.5):
        optimizer.step()
        reducer.step(loss)
        boost.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == pytest.approx([0.1, 0.05 * RATIO, 0.025 * RATIO, 0.025 * RATIO], rel=1e-12)


@pytest.mark.parametrize("boost_first", [True, False])
def test_an_undone_boost_is_reported_once(boost_first: bool) -> None:
    """Catches silence where μ is doubled but lr is back at its old value: the run may diverge."""
    optimizer = arsg()
    other = torch_schedulers.LambdaLR(optimizer, lambda t: RATIO if t % 2 else 1.0)
    boost = ObservationBoost(optimizer, [BOOST_AT])
    with pytest.warns(UserWarning, match=r"ObservationBoost\(rescale=\[\.\.\.\]\)") as caught:
        history(optimizer, *((boost, other) if boost_first else (other, boost)))
    assert len(caught) == 1


def test_rescale_takes_schedulers_only() -> None:
    """Catches something in `rescale` that has no base lr and would be silently ignored."""
    with pytest.raises(TypeError, match="rescale takes torch's schedulers, got float"):
        ObservationBoost(arsg(), [1], rescale=[0.1])  # type: ignore[list-item]


def test_jumping_to_a_step_is_refused() -> None:
    """Catches step(epoch), torch's deprecated form: which boosts were made could not be told."""
    boost = ObservationBoost(arsg(), [1])
    boost.optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that the form is deprecated
        with pytest.raises(ValueError, match="cannot jump to step 3"):
            boost.step(3)


Built = tuple[ARSG, list[LRScheduler], ObservationBoost | None]


def chained() -> Built:
    optimizer = arsg()
    decay = torch_schedulers.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    boost = ObservationBoost(optimizer, [2, 5], rescale=[decay])
    parts = [Beta1Warmup(optimizer, 4), torch_schedulers.LinearLR(optimizer, 0.1, total_iters=3), boost]
    return optimizer, [decay, ChainedScheduler(parts)], None


def in_sequence() -> Built:
    settings: dict[str, Any] = {"lr": 0.1, "mu": 0.05}
    if hasattr(
        LRScheduler, "_update_lr"
    ):  # torch 2.6's SequentialLR makes lr and initial_lr one and the same tensor
        settings = {name: torch.tensor(value, dtype=torch.float64) for name, value in settings.items()}
    optimizer = arsg(**settings)
    decay = torch_schedulers.StepLR(optimizer, 2)
    boost = ObservationBoost(optimizer, [1, 3], rescale=[decay])
    warmup = torch_schedulers.LinearLR(optimizer, 0.1, total_iters=3)
    return optimizer, [SequentialLR(optimizer, [warmup, boost, decay], [3, 7])], None


def flattening() -> Built:
    optimizer = arsg()
    boost = ObservationBoost(optimizer, plateau=LossPlateau(0.2, threshold=0.05, patience=1), max_boosts=2)
    return optimizer, [torch_schedulers.ExponentialLR(optimizer, 0.9), boost], boost


def run(built: Built, first: int, last: int) -> list[tuple[float, float, float]]:
    optimizer, schedulers, boost = built
    seen = []
    for step in range(first, last):
        optimizer.step()
        if boost is not None:
            boost.record(0.7 ** min(step, 3))
        for scheduler in schedulers:
            scheduler.step()
        group = optimizer.param_groups[0]
        seen.append((float(group["lr"]), float(group["mu"]), group["betas"][0]))
    return seen


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 6, 7, 9])
@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("build", [chained, in_sequence, flattening])
def test_interrupted_and_resumed_equals_uninterrupted(
    build: Callable[[], Built], stop: int, optimizer_first: bool
) -> None:
    """Catches any part of lr, μ or β1's history that is not in the states, whichever is loaded first."""
    uninterrupted = run(build(), 0, 10)
    assert len({mu for _, mu, _ in uninterrupted}) >= 2

    before = build()
    seen = run(before, 0, stop)
    state = copy.deepcopy([before[0].state_dict(), [scheduler.state_dict() for scheduler in before[1]]])
    after = build()
    if optimizer_first:
        after[0].load_state_dict(state[0])
    for scheduler, scheduler_state in zip(after[1], state[1], strict=True):
        scheduler.load_state_dict(scheduler_state)
    if not optimizer_first:
        after[0].load_state_dict(state[0])
    assert seen + run(after, stop, 10) == uninterrupted


def test_resume_where_the_optimizer_was_loaded_before_the_scheduler_was_made() -> None:
    """Catches a construction that takes the boosted μ for the first one and refuses to go past 1."""
    optimizer = arsg(mu=0.3)
    boost = ObservationBoost(optimizer, [1])
    history(optimizer, boost, steps=2)
    resumed = arsg(mu=0.3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = ObservationBoost(resumed, [1])
    again.load_state_dict(boost.state_dict())
    assert math.isclose(resumed.param_groups[0]["mu"], 0.6)
    lr = optimizer.param_groups[0]["lr"]
    assert history(resumed, again, steps=2) == [lr] * 3


def test_another_schedules_base_values_are_scaled_by_each_groups_own_ratio() -> None:
    """Catches the first group's ratio for all groups, seen where the other schedule computes lr anew."""
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "betas": (beta1, 0.99)} for beta1 in (0.999, 0.5)
    ]
    optimizer = ARSG(groups, lr=0.1, mu=0.05)
    other = torch_schedulers.LambdaLR(optimizer, lambda step: 0.5**step)
    boost = ObservationBoost(optimizer, [1], rescale=[other])
    for _ in range(2):
        optimizer.step()
        other.step()
        boost.step()
    expected = [0.1 * 0.25 * theory.boost_ratio(beta1, 0.05, 0.1) for beta1 in (0.999, 0.5)]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
