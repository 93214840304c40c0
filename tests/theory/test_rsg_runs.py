"""The theory against the optimizer itself: real RSG runs (ARSG without preconditioner) on quadratics."""

import math

import pytest
import torch
from torch import Tensor

from arsg_dist import ARSG, theory

torch.set_num_threads(1)

COEFFICIENTS = [(0.5, 0.1), (0.5, 0.8), (0.9, 0.05), (0.9, 0.3), (0.95, 0.01), (0.95, 0.0)]


def run_rsg(curvatures: Tensor, lr: float, beta: float, mu: float, steps: int) -> Tensor:
    """Minimise ½·Σ λᵢxᵢ² from x = 1; return x after every step, shape (steps + 1, len(curvatures))."""
    x = torch.ones_like(curvatures, requires_grad=True)
    optimizer = ARSG([x], lr=lr, betas=(beta, 0.99), mu=mu, preconditioner="none")
    trajectory = [x.detach().clone()]
    for _ in range(steps):
        x.grad = curvatures * x.detach()
        optimizer.step()
        trajectory.append(x.detach().clone())
    return torch.stack(trajectory)


def measured_log_rate(x: Tensor) -> Tensor:
    """The slope of log max|x| between two windows, long enough to contain an oscillation; shape of one x."""
    steps = len(x) - 1
    window = steps // 10
    early, late = x[window : 2 * window].abs().amax(0), x[-window:].abs().amax(0)
    return (late.log() - early.log()) / (steps + 1 - 2 * window)


def interesting_taus(beta: float, mu: float) -> Tensor:
    """τ in every branch: real below τ_cb-, complex, real above τ_cb+, and near the bound."""
    minus, plus = theory.critical_points(beta, mu)
    bound = theory.convergence_bound(beta, mu)
    taus = [0.5 * minus, 0.3 * minus + 0.7 * plus, 0.9 * plus, 0.7 * plus + 0.3 * bound, 0.9 * bound]
    return torch.tensor(taus, dtype=torch.float64)


@pytest.mark.parametrize(("beta", "mu"), COEFFICIENTS)
def test_asymptotic_rate_of_a_run_is_the_gain_factor(beta: float, mu: float) -> None:
    """Catches theory and optimizer disagreeing on the meaning of β, μ or α, in any branch of r(τ)."""
    tau, lr = interesting_taus(beta, mu), 0.3
    predicted = theory.gain_factor(tau, beta, mu).log()
    steps = (-100 / predicted).ceil().int().tolist()  # |x| falls to e⁻¹⁰⁰, far from underflow
    x = run_rsg(tau / lr, lr, beta, mu, max(steps))
    for element, (count, rate) in enumerate(zip(steps, predicted.tolist(), strict=True)):
        assert measured_log_rate(x[: count + 1, element]).item() == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(("beta", "mu"), COEFFICIENTS)
def test_first_steps_of_a_run_have_the_predicted_eigenvalues(beta: float, mu: float) -> None:
    """Catches what the slope cannot see: the recurrence fitted to four points gives r to 8 digits."""
    tau = interesting_taus(beta, mu)
    x = run_rsg(tau, 1.0, beta, mu, 3)
    # x_{t+2} = ρ·x_{t+1} − δ·x_t for t = 0, 1
    rows = torch.stack([torch.stack([x[1], -x[0]], -1), torch.stack([x[2], -x[1]], -1)], -2)
    trace, determinant = torch.linalg.solve(rows, torch.stack([x[2], x[3]], -1)).unbind(-1)
    root = (trace**2 - 4 * determinant).to(torch.complex128).sqrt()
    radius = torch.maximum((trace + root).abs(), (trace - root).abs()) / 2
    torch.testing.assert_close(radius, theory.gain_factor(tau, beta, mu), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("beta", "mu"), COEFFICIENTS)
def test_runs_converge_just_below_the_bound_and_diverge_just_above(beta: float, mu: float) -> None:
    """Catches a bound that the optimizer does not obey: 1 % on either side of it."""
    bound = theory.convergence_bound(beta, mu)
    below, above = run_rsg(torch.tensor([0.99, 1.01], dtype=torch.float64), bound, beta, mu, 3_000)[-1].abs()
    assert below < 1e-3
    assert above > 1e3


@pytest.mark.parametrize(
    ("c_beta", "c_mu", "c_alpha"), [(2.0, 2.0, None), (1.0, 10.0, None), (3.0, 3.0, 0.2)]
)
def test_recommended_settings_reach_their_rate(c_beta: float, c_mu: float, c_alpha: float | None) -> None:
    """Catches settings whose promised rate a quadratic of that condition number does not show."""
    kappa = 2_500.0
    settings = theory.recommended_settings(kappa, 5.0, c_beta=c_beta, c_mu=c_mu, c_alpha=c_alpha)
    curvatures = torch.logspace(math.log10(5.0 / kappa), math.log10(5.0), 30, dtype=torch.float64)
    x = run_rsg(curvatures, settings.lr, settings.beta, settings.mu, 6_000)
    norm = x.abs().amax(1, keepdim=True)
    assert measured_log_rate(norm).item() == pytest.approx(math.log(settings.exact_rate), rel=0.03)
    assert 1 - settings.exact_rate == pytest.approx(1 - settings.predicted_rate, rel=0.2)


def test_boosting_a_run_at_its_optimum_keeps_it_at_the_optimum() -> None:
    """Catches a ratio that slows the boosted run: r must fall to the minimum over τ that the new μ allows."""
    beta, mu, curvature = 0.9, 0.15, torch.tensor([3.0], dtype=torch.float64)
    lr = theory.optimal_tau(beta, mu) / 3.0
    boosted = run_rsg(curvature, lr * theory.boost_ratio(beta, mu, 2 * mu), beta, 2 * mu, 300)
    others = [
        run_rsg(curvature, lr * theory.boost_ratio(beta, mu, 2 * mu) * factor, beta, 2 * mu, 300)
        for factor in (0.8, 1.25)
    ]
    rate = measured_log_rate(boosted).item()
    assert all(rate < measured_log_rate(other).item() for other in others)


@pytest.mark.parametrize(("beta", "mu"), [(0.9, 0.05), (0.95, 0.5)])
def test_parameters_run_ahead_by_the_observation_distance(beta: float, mu: float) -> None:
    """Catches a wrong η: with it the base iterate θ = x + α·η·m obeys θ ← θ − α·m, as plain momentum does."""
    lr, curvature = 0.3, torch.tensor([1.7], dtype=torch.float64)
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = ARSG([x], lr=lr, betas=(beta, 0.99), mu=mu, preconditioner="none")
    eta = theory.observation_distance(beta, mu)
    theta = x.detach().clone()  # m = 0: x and θ coincide
    for _ in range(50):
        x.grad = curvature * x.detach()
        optimizer.step()
        m = optimizer.state[x]["exp_avg"]
        theta = theta - lr * m
        torch.testing.assert_close(x.detach(), theta - lr * eta * m, rtol=1e-12, atol=1e-13)
