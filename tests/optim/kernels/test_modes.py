"""Bias correction, cautious decay and the order of averaging and preconditioning, against rules written down here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from arsg_dist import ARSG, RemoteObservation
from tests.optim.optim_paths import ALL_PATHS, MODES, PATHS, Path, assert_close, gradients, parameters, run

SHAPES = [(7,), (3, 4), ()]
STEPS = 300


def along(optimizer: torch.optim.Optimizer, params: list[Any], grads: list[list[Tensor]]) -> list[Tensor]:
    """All parameters after every step, one flat tensor each."""
    points = []
    for step_grads in grads:
        run(optimizer, params, [step_grads])
        points.append(torch.cat([param.detach().flatten() for param in params]))
    return points


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_same_way(actual: list[Tensor], expected: list[Tensor], relative: float = 1e-12) -> None:
    assert_close(torch.stack(actual), torch.stack(expected), relative)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("mu", "beta1"), [(0.1, 0.999), (0.3, 0.9)])
def test_correcting_the_second_moment_alone_is_simplified_ademamix(
    path: Path, mu: float, beta1: float
) -> None:
    """Catches m corrected too, v not corrected, and a weight of the plain gradient that is off.

    The paper's (2502.02431): m a sum with decay β1, the update (m + a·g)/(√v̂ + ε) + λx, here with its own η, a, λ.
    """
    beta2, eps, weight, eta, lam = 0.95, 1e-3, mu / ((1 - mu) * (1 - beta1)), 2e-4, 0.5
    params, grads = parameters(SHAPES), gradients(SHAPES, STEPS)
    x, m, v = flat(params), torch.zeros(20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    expected = []
    for t, step_grads in enumerate(grads, 1):
        g = flat(step_grads)
        m = beta1 * m + g
        v = beta2 * v + (1 - beta2) * g**2
        x = x - eta * ((m + weight * g) / ((v / (1 - beta2**t)).sqrt() + eps) + lam * x)
        expected.append(x)
    lr = eta / ((1 - mu) * (1 - beta1))
    ours = ARSG(
        params, lr=lr, betas=(beta1, beta2), eps=eps, mu=mu, preconditioner="adam", bias_correction="second",
        weight_decay=lam * eta / lr, decoupled_weight_decay=True, **path.settings,
    )  # fmt: skip
    assert_same_way(along(ours, params, grads), expected)


@pytest.mark.parametrize("path", PATHS)
def test_no_correction_leaves_both_moments_small(path: Path) -> None:
    """Catches "none" that corrects one of them."""
    beta1, beta2, mu, eps, lr = 0.9, 0.99, 0.2, 1e-3, 0.05
    params, grads = parameters(SHAPES), gradients(SHAPES, STEPS)
    x, m, v = flat(params), torch.zeros(20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    expected = []
    for g in map(flat, grads):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        x = x - lr * ((1 - mu) * m + mu * g) / (v.sqrt() + eps)
        expected.append(x)
    ours = ARSG(
        params, lr=lr, betas=(beta1, beta2), eps=eps, mu=mu, preconditioner="adam", bias_correction="none",
        **path.settings,
    )  # fmt: skip
    assert_same_way(along(ours, params, grads), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("preconditioner", ["adam", "amsgrad"])
@pytest.mark.parametrize(("mu", "beta1"), [(0.1, 0.999), (0.3, 0.9)])
def test_averaging_preconditioned_gradients_is_remote_observation_around_no_momentum(
    path: Path, preconditioner: str, mu: float, beta1: float
) -> None:
    """Catches the plain gradient left undivided, a division twice, and a base iterate with the other order's."""
    lr, beta2, eps = 0.05, 0.9, 1e-3
    settings = {"betas": (beta1, beta2), "eps": eps, "preconditioner": preconditioner, **path.settings}
    params, others = parameters(SHAPES), parameters(SHAPES)
    grads = gradients(SHAPES, STEPS)
    correction = {"bias_correction": "second"} if preconditioner == "adam" else {}
    ours = ARSG(params, lr=lr, mu=mu, precondition_first=True, **settings, **correction)
    inner = (
        torch.optim.AdamW(others, lr=lr * mu, betas=(0.0, beta2), eps=eps, weight_decay=0.0)
        if preconditioner == "adam"
        else ARSG(others, lr=lr * mu, mu=0.0, **{**settings, "betas": (0.0, beta2)})
    )
    remote = RemoteObservation(inner, mu=mu, beta1=beta1)
    assert_same_way(along(ours, params, grads), along(remote, others, grads))
    distance = mu * beta1 / (1 - beta1)
    theta = flat([x - distance * remote.state[x]["movement"] for x in others])
    with ours.base_iterate():
        assert_close(flat(params), theta, 1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_averaging_preconditioned_gradients_without_observation_is_laprop(path: Path) -> None:
    """Catches m that is not corrected in this order, and coupled decay added after the division."""
    beta1, beta2, eps, lr, lam = 0.9, 0.99, 1e-3, 0.02, 0.1
    params, grads = parameters(SHAPES), gradients(SHAPES, STEPS)
    x, m, v = flat(params), torch.zeros(20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    expected = []
    for t, step_grads in enumerate(grads, 1):
        g = flat(step_grads) + lam * x
        v = beta2 * v + (1 - beta2) * g**2
        m = beta1 * m + (1 - beta1) * g / ((v / (1 - beta2**t)).sqrt() + eps)
        x = x - lr * m / (1 - beta1**t)
        expected.append(x)
    ours = ARSG(
        params, lr=lr, betas=(beta1, beta2), eps=eps, mu=0.0, preconditioner="adam", precondition_first=True,
        weight_decay=lam, **path.settings,
    )  # fmt: skip
    assert_same_way(along(ours, params, grads), expected)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("first", [False, True])
def test_cautious_decay_spares_what_the_update_moves_away_from_zero(
    path: Path, mode: str, first: bool
) -> None:
    """Catches decay by the sign of the gradient or of m, of the point after the step, and none where nothing moves.

    The step without decay is taken from the reference; the decay is the paper's λ·1(u·x ≥ 0)·x.
    """
    lr, lam = 0.05, 2.0
    settings = {
        "lr": lr,
        "betas": (0.9, 0.99),
        "mu": 0.3,
        "preconditioner": mode,
        "precondition_first": first,
    }
    params, others = parameters(SHAPES), parameters(SHAPES)
    grads = gradients(SHAPES, 100)
    for step_grads in grads:
        step_grads[0][0] = 0.0  # decays, as the paper's ≥ says
    ours = ARSG(
        params, weight_decay=lam, decoupled_weight_decay=True, cautious_weight_decay=True, **settings,
        **path.settings,
    )  # fmt: skip
    plain = ARSG(others, foreach=False, **settings)
    spared = 0
    for step_grads in grads:
        before = [x.detach().clone() for x in others]
        run(plain, others, [step_grads])
        with torch.no_grad():
            for x, x0 in zip(others, before, strict=True):
                aligned = (x0 - x) * x0 >= 0
                spared += int((~aligned).sum())
                x.sub_(torch.where(aligned, lr * lam * x0, 0.0))
        run(ours, params, [step_grads])
    assert 100 < spared < 1900
    assert 0 < abs(params[0][0].item()) < 1e-4, "an element without gradient decays"
    tolerance = 1e-5 if path.settings.get("capturable") else 1e-12
    for x, y in zip(params, others, strict=True):
        assert_close(x.detach(), y.detach(), tolerance)


@pytest.mark.parametrize("correction", ["second", "none"])
@pytest.mark.parametrize("first", [False, True])
def test_the_base_iterate_is_what_the_observation_runs_ahead_of(correction: str, first: bool) -> None:
    """Catches a θ that corrects a moment that the update does not correct.

    At a constant denominator θ makes the steps of the average alone: θ' = θ − α·m (over its denominator).
    """
    lr, beta1, eps = 0.05, 0.9, 0.5
    x = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = ARSG(
        [x], lr=lr, betas=(beta1, 0.0), eps=eps, mu=0.3, preconditioner="adam", bias_correction=correction,
        precondition_first=first,
    )  # fmt: skip
    theta, m = x.detach().clone(), 0.0
    for sign in (1.0, 1.0, -1.0, 1.0, -1.0, -1.0):  # g² = 1 at every step
        run(optimizer, [x], [[torch.tensor([sign], dtype=torch.float64)]])
        m = beta1 * m + (1 - beta1) * sign
        theta = theta - lr * m / (1.0 + eps)
        with optimizer.base_iterate():
            assert_close(x.detach(), theta, 1e-12)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"cautious_weight_decay": True}, ValueError, "decoupled_weight_decay=True"),
        ({"bias_correction": "first"}, ValueError, "'both', 'second', 'none'"),
        ({"bias_correction": True}, TypeError, "write 'both'"),
        ({"bias_correction": "second", "preconditioner": "amsgrad"}, ValueError, "for preconditioner 'adam'"),
        ({"precondition_first": "yes"}, TypeError, "precondition_first must be True or False"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    """Catches a decay or correction that a user asked for and that is left out without a word."""
    with pytest.raises(error, match=says):
        ARSG(parameters([(2,)]), **settings)


def test_a_state_saved_before_these_settings_goes_on() -> None:
    """Catches a checkpoint of an older release refused, or gone on with under other rules."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    grads = gradients(SHAPES, 6)
    settings: dict[str, Any] = {"lr": 0.05, "preconditioner": "adam"}
    run(ARSG(others, **settings), others, grads)
    first = ARSG(params, **settings)
    run(first, params, grads[:3])
    saved = first.state_dict()
    for group in saved["param_groups"]:
        for name in ("cautious_weight_decay", "bias_correction", "precondition_first"):
            del group[name]
    second = ARSG(params, **settings)
    second.load_state_dict(saved)
    run(second, params, grads[3:])
    assert torch.equal(flat(params), flat(others))
