"""ObservationBoost on its own: what a boost changes, when, and what is refused."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from arsg_dist import ARSG, theory
from arsg_dist.optim.schedulers.boost import ObservationBoost
from arsg_dist.optim.schedulers.loss_plateau import LossPlateau

torch.set_num_threads(1)

RATIO = theory.boost_ratio(0.999, 0.05, 0.1)


def arsg(*groups: dict[str, Any], **defaults: Any) -> ARSG:
    settings: dict[str, Any] = {"lr": 0.1, "mu": 0.05, **defaults}
    return ARSG(
        [{"params": [torch.nn.Parameter(torch.ones(2))], **group} for group in groups or ({},)], **settings
    )


def advance(
    optimizer: Optimizer, boost: ObservationBoost, loss: float | Tensor | None = None
) -> tuple[float, float]:
    if loss is not None:
        boost.record(loss)
    optimizer.step()
    boost.step()
    group = optimizer.param_groups[0]
    return float(group["lr"]), float(group["mu"])


def test_milestones_double_mu_and_scale_lr_by_the_exact_ratio() -> None:
    """Catches the paper's rounded 1/4, a boost at the wrong step, and lr or μ touched between boosts."""
    optimizer = arsg()
    boost = ObservationBoost(optimizer, milestones=[5, 2])
    seen = [(optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["mu"])]
    seen += [advance(optimizer, boost) for _ in range(6)]
    once, twice = 0.1 * RATIO, 0.1 * RATIO * theory.boost_ratio(0.999, 0.1, 0.2)
    assert seen == [(0.1, 0.05)] * 2 + [(once, 0.1)] * 3 + [(twice, 0.2)] * 2
    assert boost.boosts == 2
    assert boost.get_last_lr() == boost.get_lr() == boost.base_lrs == [twice]


def test_each_group_has_its_own_ratio() -> None:
    """Catches a ratio computed from the first group's β1 and μ, and a group with μ = 0 that is changed."""
    optimizer = arsg({"betas": (0.9, 0.99), "lr": 1.0}, {"mu": 0.2, "lr": 2.0}, {"mu": 0.0, "lr": 3.0})
    boost = ObservationBoost(optimizer, [1], factor=3.0)
    advance(optimizer, boost)
    groups = optimizer.param_groups
    assert groups[0]["lr"] == theory.boost_ratio(0.9, 0.05, 0.05 * 3)
    assert groups[1]["lr"] == 2.0 * theory.boost_ratio(0.999, 0.2, 0.2 * 3)
    assert groups[2]["lr"] == 3.0
    assert [group["mu"] for group in groups] == [0.05 * 3, 0.2 * 3, 0.0]


def test_tensors_are_updated_in_place() -> None:
    """Catches tensors replaced by new ones or by floats, which a captured graph would never see."""
    lr, mu = torch.tensor(0.1), torch.tensor(0.05)
    optimizer = arsg(lr=lr, mu=mu)
    boost = ObservationBoost(optimizer, [1])
    advance(optimizer, boost)
    assert optimizer.param_groups[0]["lr"] is lr
    assert optimizer.param_groups[0]["mu"] is mu
    assert mu.item() == pytest.approx(0.1)
    assert lr.item() == pytest.approx(0.1 * RATIO)
    last = boost.get_last_lr()[0]
    assert isinstance(last, Tensor)
    assert last is not lr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either milestones or plateau"),
        ({"milestones": [1], "plateau": LossPlateau()}, "either milestones or plateau"),
        ({"milestones": []}, "must not be empty"),
        ({"milestones": [0]}, "integers ≥ 1"),
        ({"milestones": [1.5]}, "integers ≥ 1"),
        ({"milestones": [True]}, "integers ≥ 1"),
        ({"milestones": [3, 3]}, "differ from each other"),
        ({"milestones": [1], "factor": 1.0}, "factor must be > 1"),
        ({"milestones": [1], "factor": float("nan")}, "factor must be > 1"),
        ({"milestones": [1], "factor": 20.0}, "would not stay below 1"),
        ({"milestones": [1, 2, 3, 4, 5]}, "would not stay below 1"),
        ({"plateau": LossPlateau(), "max_boosts": 5}, "would not stay below 1"),
        ({"plateau": LossPlateau(), "max_boosts": 0}, "max_boosts must be"),
        ({"milestones": [1], "max_boosts": 1}, "belong to plateau"),
        ({"milestones": [1], "reduce": lambda totals: totals}, "belong to plateau"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_changed(
    arguments: dict[str, Any], message: str
) -> None:
    """Catches a setting that is silently ignored, or found wrong only at the boost, hours into a run."""
    optimizer = arsg()
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    with pytest.raises(ValueError, match=message):
        ObservationBoost(optimizer, **arguments)
    after = {
        key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "initial_mu")
    }
    assert after == before


def test_optimizers_without_observation_are_refused() -> None:
    """Catches a KeyError deep inside, or a boost that does nothing."""
    with pytest.raises(
        ValueError, match=r"has no 'mu' or 'betas'.*such as ARSG or RemoteObservation, got SGD"
    ):
        ObservationBoost(SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1), [1])
    with pytest.raises(ValueError, match=r"nothing to boost; start with mu = 0\.05"):
        ObservationBoost(arsg(mu=0.0), [1])


def test_a_mu_raised_by_someone_else_is_not_boosted_past_1() -> None:
    """Catches μ ≥ 1 where another hand changed μ after the construction; nothing may be half changed."""
    optimizer = arsg({}, {})
    boost = ObservationBoost(optimizer, [1])
    optimizer.param_groups[1]["mu"] = 0.6
    with pytest.raises(ValueError, match="would not stay below 1"):
        advance(optimizer, boost)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert [group["mu"] for group in optimizer.param_groups] == [0.05, 0.6]


class ZeroLikeWrapper:
    """As DeepSpeed's ZeRO optimizers: no torch optimizer itself, but it has one and shares its groups."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


def test_a_wrapped_optimizer_is_found_and_anything_else_refused_clearly() -> None:
    """Catches torch's bare "X is not an Optimizer" where a DeepSpeed user hands over the wrapper."""
    optimizer = arsg()
    boost = ObservationBoost(ZeroLikeWrapper(optimizer), [1])  # type: ignore[arg-type]
    assert boost.optimizer is optimizer
    assert advance(optimizer, boost) == (0.1 * RATIO, 0.1)
    with pytest.raises(TypeError, match="got list; with DeepSpeed pass lr_scheduler=lambda optimizer"):
        ObservationBoost([optimizer], [1])  # type: ignore[arg-type]


def test_a_flat_loss_boosts_once_by_default() -> None:
    """Catches a plateau that is not noticed, noticed at the wrong observation, or boosted again and again."""
    optimizer = arsg()
    boost = ObservationBoost(optimizer, plateau=LossPlateau(0.0, threshold=0.1, patience=1))
    mus = [advance(optimizer, boost, loss)[1] for loss in (1.0, 0.8, 0.79, 0.78, 0.78, 0.78, 0.78, 0.78)]
    assert (
        mus == [0.05] * 3 + [0.1] * 5
    )  # 0.79 and 0.78 are not 10 % below 0.8: the second exceeds the patience


def test_max_boosts_and_cooldown_space_the_boosts() -> None:
    """Catches a cooldown that is ignored, or one boost too many."""
    optimizer = arsg()
    plateau = LossPlateau(0.0, patience=0, cooldown=2)
    boost = ObservationBoost(optimizer, plateau=plateau, max_boosts=2)
    mus = [advance(optimizer, boost, 1.0)[1] for _ in range(8)]
    assert mus == [0.05] + [0.1] * 3 + [0.2] * 4


def test_losses_of_an_observation_are_averaged() -> None:
    """Catches a detector that sees only the last loss, counts every record, or chokes on dtypes and NaN."""
    optimizer = arsg()
    plateau = LossPlateau(0.0)
    boost = ObservationBoost(optimizer, plateau=plateau)
    for loss in (
        torch.tensor([3.0], dtype=torch.bfloat16),
        1.0,
        torch.tensor(2),
        float("nan"),
        torch.tensor(torch.inf),
    ):
        boost.record(loss)
    advance(optimizer, boost)
    assert plateau.average == 2.0
    advance(optimizer, boost, 5.0)
    assert plateau.average == 5.0
    advance(optimizer, boost)  # nothing recorded: no observation
    advance(optimizer, boost, float("nan"))
    assert plateau.average == 5.0


def test_record_takes_scalars_and_only_in_plateau_mode() -> None:
    """Catches a loss vector that is silently summed, or losses recorded that nobody looks at."""
    with pytest.raises(ValueError, match="must be a scalar"):
        ObservationBoost(arsg(), plateau=LossPlateau()).record(torch.ones(2))
    with pytest.raises(RuntimeError, match="this one has milestones"):
        ObservationBoost(arsg(), [1]).record(1.0)


def test_record_keeps_no_graph_alive() -> None:
    """Catches a loss that is accumulated without detach: memory would grow over the epoch."""
    boost = ObservationBoost(arsg(), plateau=LossPlateau())
    boost.record(torch.ones(1, requires_grad=True).sum())
    assert not boost._losses._totals.requires_grad


def test_reduce_may_sum_or_average() -> None:
    """Catches a decision that depends on the reduction being a sum (Horovod averages by default)."""
    for scale in (1.0, 0.25):
        plateau = LossPlateau(0.0)
        optimizer = arsg()
        boost = ObservationBoost(
            optimizer, plateau=plateau, reduce=lambda totals, scale=scale: scale * totals
        )
        boost.record(1.0)
        advance(optimizer, boost, 2.0)
        assert plateau.average == 1.5


def test_ranks_stop_communicating_after_the_last_boost() -> None:
    """Catches a reduction on every step for the rest of the run."""
    reductions: list[Tensor] = []

    def reduce(totals: Tensor) -> Tensor:
        reductions.append(totals)
        return totals

    optimizer = arsg()
    boost = ObservationBoost(optimizer, plateau=LossPlateau(0.0, patience=0), reduce=reduce)
    for _ in range(5):
        advance(optimizer, boost, 1.0)
    assert boost.boosts == 1
    assert len(reductions) == 2


@pytest.mark.parametrize("plateau", [False, True])
def test_state_is_plain_enough_for_safe_loading(plateau: bool) -> None:
    """Catches optimizers, closures or objects in the state, which torch.load(weights_only=True) refuses; and progress
    that does not come through the file, so that what was boosted is boosted again."""
    loss = 1.0 if plateau else None

    def made() -> tuple[ARSG, ObservationBoost]:
        optimizer = arsg(lr=torch.tensor(0.1))
        how: dict[str, Any] = {"plateau": LossPlateau(patience=0)} if plateau else {"milestones": [2]}
        return optimizer, ObservationBoost(optimizer, **how)

    optimizer, boost = made()
    for _ in range(2):
        advance(optimizer, boost, loss)
    assert boost.boosts == 1
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), boost.state_dict()], file)
    file.seek(0)
    resumed, again = made()
    of_optimizer, of_boost = torch.load(file, weights_only=True)
    resumed.load_state_dict(of_optimizer)
    again.load_state_dict(of_boost)
    after = advance(resumed, again, loss)
    assert after == advance(optimizer, boost, loss)
    assert after == (pytest.approx(0.1 * RATIO), pytest.approx(0.1))
    assert again.boosts == 1


def test_a_state_of_the_other_mode_is_refused() -> None:
    """Catches a resume that silently starts without its plateau history."""
    with pytest.raises(ValueError, match="saved with milestones instead of plateau"):
        ObservationBoost(arsg(), plateau=LossPlateau()).load_state_dict(
            ObservationBoost(arsg(), [1]).state_dict()
        )


@pytest.mark.parametrize("stop", range(8))
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_plateau_resume_is_exact(stop: int, optimizer_first: bool) -> None:
    """Catches lost averages, counters, half-recorded observations or boosts after a resume at any step."""
    losses = [1.0, 0.8, 0.82, 0.81, 0.81, 0.81, 0.4, 0.41, 0.41, 0.41, 0.41]

    def start() -> tuple[ARSG, ObservationBoost]:
        optimizer = arsg()
        plateau = LossPlateau(0.3, patience=1, cooldown=1)
        return optimizer, ObservationBoost(optimizer, plateau=plateau, max_boosts=2)

    def go(optimizer: ARSG, boost: ObservationBoost, losses: list[float]) -> list[tuple[float, float]]:
        seen = []
        for loss in losses:
            seen.append(advance(optimizer, boost, loss))
            boost.record(2 * loss)  # pending at the next step
        return seen

    uninterrupted = go(*start(), losses)
    assert len(set(uninterrupted)) == 3
    optimizer, boost = start()
    seen = go(optimizer, boost, losses[:stop])
    states: list[Any] = [optimizer.state_dict(), boost.state_dict()]
    resumed: list[Any] = list(start())
    for index in (0, 1) if optimizer_first else (1, 0):
        resumed[index].load_state_dict(states[index])
    assert seen + go(*resumed, losses[stop:]) == uninterrupted
    assert resumed[1].base_lrs == [uninterrupted[-1][0]]
