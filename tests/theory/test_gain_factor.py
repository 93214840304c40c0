"""The closed forms of `arsg_dist.theory` against eigenvalues of the iteration matrix and dense search over
τ."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arsg_dist import theory

torch.set_num_threads(1)

BETAS = [0.5, 0.9, 0.99, 0.999]
MUS = [0.001, 0.01, 0.05, 0.1, 0.4, 0.9]
COEFFICIENTS = [(beta, mu) for beta in BETAS for mu in MUS]
unit = st.floats(0.0, 0.9999)


def iteration_matrix(tau: Tensor, beta: float, mu: float) -> Tensor:
    """One step of RSG on the curvature λ as a matrix acting on (x, m/λ), written down from the update
    rule."""
    # m' = β·m + (1−β)·x;  x' = x − τ·((1−μ)·m' + μ·x)
    from_x = 1 - tau * ((1 - mu) * (1 - beta) + mu)
    from_m = -tau * (1 - mu) * beta
    keeps, takes = torch.full_like(tau, beta), torch.full_like(tau, 1 - beta)
    return torch.stack([torch.stack([from_x, from_m], -1), torch.stack([takes, keeps], -1)], -2)


def spectral_radius(tau: Tensor, beta: float, mu: float) -> Tensor:
    return torch.linalg.eigvals(iteration_matrix(tau, beta, mu)).abs().amax(-1)


def taus(beta: float, mu: float, count: int) -> Tensor:
    """A grid over (0, 1.2·bound), dense both near zero and near the critical points."""
    bound = theory.convergence_bound(beta, mu)
    minus, plus = theory.critical_points(beta, mu)
    logarithmic = torch.logspace(-8, math.log10(1.2 * bound), count, dtype=torch.float64)
    near = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    return torch.cat([logarithmic, near * minus, near * plus]).sort().values


@pytest.mark.parametrize(("beta", "mu"), [*COEFFICIENTS, (0.9, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_gain_factor_is_the_spectral_radius_in_both_branches(beta: float, mu: float) -> None:
    """Catches a wrong trace, determinant or branch of r(τ)."""
    tau = taus(beta, mu, 500)
    # eigvals itself is only accurate to √eps where the two eigenvalues coincide
    torch.testing.assert_close(
        theory.gain_factor(tau, beta, mu), spectral_radius(tau, beta, mu), rtol=0, atol=1e-7
    )


@settings(max_examples=200)
@given(st.floats(0.0, 50.0), unit, unit)
def test_gain_factor_of_any_coefficients(tau: float, beta: float, mu: float) -> None:
    """Catches a branch that only fails outside the usual settings (β or μ of 0, both near 1)."""
    expected = spectral_radius(torch.tensor(tau, dtype=torch.float64), beta, mu).item()
    assert theory.gain_factor(tau, beta, mu) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=200)
@given(unit, unit)
def test_convergence_bound_separates_convergence_from_divergence(beta: float, mu: float) -> None:
    """Catches a bound that is too high or too low by a millionth."""
    bound = torch.tensor(theory.convergence_bound(beta, mu), dtype=torch.float64)
    assert spectral_radius(bound * (1 - 1e-6), beta, mu) < 1
    assert spectral_radius(bound * (1 + 1e-6), beta, mu) > 1


@pytest.mark.parametrize(("beta", "mu"), COEFFICIENTS)
def test_critical_points_are_where_the_eigenvalues_turn_complex(beta: float, mu: float) -> None:
    """Catches τ_cb+ and τ_cb- exchanged or off: the eigenvalues are complex exactly between them."""
    minus, plus = theory.critical_points(beta, mu)
    for point, inside in ((minus, 1 + 1e-6), (plus, 1 - 1e-6)):
        for factor, is_complex in ((inside, True), (2 - inside, False)):
            tau = torch.tensor(point * factor, dtype=torch.float64)
            eigenvalues = torch.linalg.eigvals(iteration_matrix(tau, beta, mu))
            assert bool((eigenvalues.imag != 0).all()) is is_complex


@pytest.mark.parametrize(("beta", "mu"), COEFFICIENTS)
def test_critical_points_equal_the_published_form(beta: float, mu: float) -> None:
    """Catches an algebra mistake in the forms without cancellation that the code computes."""
    points = theory.critical_points(beta, mu)
    for point, sign in zip(points, (-1, 1), strict=True):
        published = (1 - beta) * (1 + beta - beta * mu + sign * 2 * math.sqrt(beta * (1 - mu)))
        published /= (1 - beta + beta * mu) ** 2
        assert point == pytest.approx(published, rel=1e-7)


@pytest.mark.parametrize(("beta", "mu"), COEFFICIENTS)
def test_optimal_tau_is_the_minimum_of_a_dense_search(beta: float, mu: float) -> None:
    """Catches τ_cb- (or any other point) taken for the minimum of the gain factor."""
    tau = taus(beta, mu, 20_000)
    optimum = theory.optimal_tau(beta, mu)
    searched = tau[spectral_radius(tau, beta, mu).argmin()].item()
    assert searched == pytest.approx(optimum, rel=2e-3)
    assert theory.gain_factor(optimum, beta, mu) <= spectral_radius(tau, beta, mu).min().item() + 1e-9
    s = math.sqrt(beta * (1 - mu))
    assert theory.gain_factor(optimum, beta, mu) == pytest.approx(abs(beta - s) / (1 - s), abs=1e-9)


@pytest.mark.parametrize(("beta", "mu"), COEFFICIENTS)
def test_gain_factor_falls_before_and_rises_after_its_minimum(beta: float, mu: float) -> None:
    """Catches a second minimum, which would make `worst_gain_factor`'s look at the two ends wrong."""
    tau = taus(beta, mu, 5_000)
    gain, optimum = theory.gain_factor(tau, beta, mu), theory.optimal_tau(beta, mu)
    assert bool((gain[tau <= optimum].diff() <= 1e-15).all())
    assert bool((gain[tau >= optimum].diff() >= -1e-15).all())


def test_without_observation_the_minimum_is_an_interval() -> None:
    """Catches a claim of a unique optimum for heavy ball (μ = 0), where r = √β in between."""
    minus, plus = theory.critical_points(0.9, 0.0)
    between = torch.linspace(minus * 1.001, plus * 0.999, 100, dtype=torch.float64)
    torch.testing.assert_close(
        theory.gain_factor(between, 0.9, 0.0), torch.full_like(between, math.sqrt(0.9))
    )
    assert theory.optimal_tau(0.9, 0.0) == plus


@pytest.mark.parametrize(("beta", "mu"), COEFFICIENTS)
def test_worst_gain_factor_is_the_largest_on_the_interval(beta: float, mu: float) -> None:
    """Catches an end of the spectrum that is forgotten."""
    for low in (1e-6, 1e-3, 0.3):
        for lr in (0.5, 2.0):
            curvatures = torch.logspace(math.log10(low), 0, 2_000, dtype=torch.float64)
            searched = spectral_radius(lr * curvatures, beta, mu).max().item()
            assert theory.worst_gain_factor(lr, beta, mu, low, 1.0) == pytest.approx(searched, abs=1e-7)


@pytest.mark.parametrize(("mu_from", "mu_to", "published"), [(0.05, 0.1, 0.248), (0.1, 0.2, 0.239)])
def test_boost_ratio_of_the_published_settings(mu_from: float, mu_to: float, published: float) -> None:
    """Catches an inverted ratio or a wrong critical point."""
    assert round(theory.boost_ratio(0.999, mu_from, mu_to), 3) == published
    assert theory.boost_ratio(0.999, mu_to, mu_from) == pytest.approx(
        1 / theory.boost_ratio(0.999, mu_from, mu_to)
    )


@pytest.mark.parametrize(("beta", "mu"), [(beta, mu) for beta, mu in COEFFICIENTS if 2 * mu < 1])
def test_boost_ratio_keeps_the_fastest_curvature_where_it_was(beta: float, mu: float) -> None:
    """Catches a ratio that moves the curvature at which the boosted iteration is fastest."""
    lr = 0.01
    fastest = theory.optimal_tau(beta, mu) / lr
    near = fastest * torch.linspace(0.9, 1.1, 2_001, dtype=torch.float64)
    boosted_lr = lr * theory.boost_ratio(beta, mu, 2 * mu)
    searched = near[spectral_radius(boosted_lr * near, beta, 2 * mu).argmin()].item()
    assert searched == pytest.approx(fastest, rel=2e-4)


@settings(max_examples=100)
@given(unit, unit, st.floats(1e-3, 1e3))
def test_largest_safe_step_balances_the_eigenvalues_below_the_bound(
    beta: float, mu: float, lambda_max: float
) -> None:
    """Catches a step that is not safe: above the convergence bound, or not at ρ = 0."""
    tau = theory.largest_safe_step(beta, mu, lambda_max) * lambda_max
    assert tau < theory.convergence_bound(beta, mu)
    matrix = iteration_matrix(torch.tensor(tau, dtype=torch.float64), beta, mu)
    assert matrix.trace().item() == pytest.approx(0.0, abs=1e-9)


def test_largest_safe_step_reaches_the_fastest_one_from_nesterovs_point_on() -> None:
    """Catches the documented order of safe step and τ_cb+ being the other way round."""
    for beta, mu in COEFFICIENTS:
        safe, fastest = theory.largest_safe_step(beta, mu, 1.0), theory.optimal_tau(beta, mu)
        if abs(mu - (1 - beta)) < 1e-12:
            assert safe == pytest.approx(fastest)
        else:
            assert (safe > fastest) is (mu > 1 - beta)


def test_observation_distance_of_known_settings() -> None:
    """Catches β and μ exchanged."""
    assert theory.observation_distance(0.999, 0.1) == pytest.approx(99.9)
    assert theory.observation_distance(0.9, 0.1) == pytest.approx(0.9)  # Nesterov's point: μ = 1−β, η = β
    assert theory.observation_distance(0.9, 0.0) == 0.0
