"""Variances of x and θ under noise, against the covariance's own equation and against runs of the optimizers."""

import math

import pytest
import torch
from torch import Tensor

from arsg_dist import ARSG, RemoteObservation, theory

torch.set_num_threads(1)

CASES = [
    (0.9, 0.0, 0.5),
    (0.9, 0.1, 0.5),
    (0.9, 0.4, 2.0),
    (0.999, 0.1, 0.3),
    (0.5, 0.2, 1.0),
    (0.0, 0.3, 1.2),
]
"""β, μ, τ."""


def covariance(lr: float, beta: float, mu: float, curvature: float, noise: float) -> Tensor:
    """Stationary covariance C of (x, m), the solution of C = A·C·Aᵀ + n·nᵀ, with A and n written down from the rule."""
    weight = (1 - mu) * (1 - beta) + mu
    step = torch.tensor(
        [[1 - lr * weight * curvature, -lr * (1 - mu) * beta], [(1 - beta) * curvature, beta]],
        dtype=torch.float64,
    )
    pushed = torch.tensor([-lr * weight * noise, (1 - beta) * noise], dtype=torch.float64)
    system = torch.eye(4, dtype=torch.float64) - torch.kron(step, step)
    return torch.linalg.solve(system, torch.outer(pushed, pushed).flatten()).view(2, 2)


@pytest.mark.parametrize(("beta", "mu", "tau"), CASES)
def test_the_variances_solve_the_equation_of_the_covariance(beta: float, mu: float, tau: float) -> None:
    """Catches a term of the closed forms, at any β and μ; θ = x + α·η·m."""
    curvature, noise = 3.0, 0.7
    lr = tau / curvature
    of_state = covariance(lr, beta, mu, curvature, noise)
    point = torch.tensor([1.0, lr * theory.observation_distance(beta, mu)], dtype=torch.float64)
    assert theory.stationary_variance(lr, beta, mu, curvature, noise) == pytest.approx(
        of_state[0, 0].item(), rel=1e-9
    )
    assert theory.base_iterate_variance(lr, beta, mu, curvature, noise) == pytest.approx(
        (point @ of_state @ point).item(), rel=1e-9
    )


@pytest.mark.parametrize("remote", [False, True])
def test_runs_of_the_optimizers_have_these_variances(remote: bool) -> None:
    """Catches a theory of another rule than the one that the optimizers make; within four standard errors.

    Independent elements, of which each has one value: the error of a variance of n normal values is √(2/n) of it.
    """
    lr, beta, mu, curvature, noise, count = 1.0, 0.9, 0.3, 0.5, 2.0, 40_000
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.Parameter(torch.zeros(count, dtype=torch.float64))
    optimizer = (
        RemoteObservation(torch.optim.SGD([x], lr=lr * mu), mu=mu, beta1=beta)
        if remote
        else ARSG([x], lr=lr, betas=(beta, 0.9), mu=mu, preconditioner="none")
    )
    for _ in range(150):
        x.grad = curvature * x.detach() + noise * torch.randn(count, generator=generator, dtype=torch.float64)
        optimizer.step()
    error = math.sqrt(2 / count)
    expected = theory.stationary_variance(lr, beta, mu, curvature, noise)
    assert x.detach().square().mean().item() == pytest.approx(expected, rel=4 * error)
    if not remote:  # θ of the wrapper is another point
        with optimizer.base_iterate():
            expected = theory.base_iterate_variance(lr, beta, mu, curvature, noise)
            assert x.detach().square().mean().item() == pytest.approx(expected, rel=4 * error)


@pytest.mark.parametrize("beta", [0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("tau", [1e-3, 0.1, 0.9, 3.0])
def test_the_quietest_mu_is_found_by_search_too(beta: float, tau: float) -> None:
    """Catches a root that is not the minimum, of x's variance or of θ's."""
    most = min(1.0, ((1 + beta) / tau - (1 - beta) / 2) / beta)  # where it just converges
    mus = torch.linspace(0, most * (1 - 1e-9), 20_001, dtype=torch.float64)
    for variance, best in (
        (theory.stationary_variance, theory.quietest_mu),
        (theory.base_iterate_variance, theory.quietest_mu_of_base_iterate),
    ):
        found = mus[variance(tau, beta, mus, 1.0, 1.0).argmin()].item()
        assert best(tau, beta) == pytest.approx(found, abs=2e-4)


def test_the_best_mu_does_not_depend_on_the_batch_and_flat_directions_do_not_mind() -> None:
    """Catches a noise that enters otherwise than as a factor."""
    mus = torch.linspace(0, 0.9, 10)
    ratio = theory.stationary_variance(0.1, 0.9, mus, 1.0, 3.0) / theory.stationary_variance(
        0.1, 0.9, mus, 1.0, 1.0
    )
    torch.testing.assert_close(ratio, torch.full_like(ratio, 9.0))
    flat = theory.stationary_variance(0.1, 0.9, mus, 1e-7, 1.0)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.1 / 2 / 1e-7), rtol=1e-6, atol=0)
    assert theory.quietest_mu(1e-9, 0.999) == pytest.approx(0.5, abs=1e-3)
    assert theory.quietest_mu(1.0, 0.999) == pytest.approx(1 / math.sqrt(1000), rel=0.05)


def test_no_stationary_state_beyond_the_bound() -> None:
    """Catches a negative variance."""
    bound = theory.convergence_bound(0.9, 0.3)
    theory.stationary_variance(bound * 0.999, 0.9, 0.3, 1.0, 1.0)
    with pytest.raises(ValueError, match="not below the convergence bound"):
        theory.stationary_variance(bound, 0.9, 0.3, 1.0, 1.0)
    with pytest.raises(ValueError, match="not below the convergence bound"):
        theory.quietest_mu(40.0, 0.9)
