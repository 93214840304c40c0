"""Settings for a condition number: the constraint, and the predicted against the exact rate."""

import math

import pytest
import torch

from arsg_dist import theory

torch.set_num_threads(1)

# complex at the smallest curvature (4c_α > c_β), real (4c_α < c_β), and μ above and below 1−β
REGIMES = [
    (1.0, 2.0, 0.5),
    (1.0, 10.0, 0.18),
    (2.0, 1.0, 0.6),
    (4.0, 2.0, 0.3),
    (1.0, 100.0, 0.019),
    (3.0, 3.0, 0.1),
]


@pytest.mark.parametrize(("c_beta", "c_mu", "c_alpha"), REGIMES)
def test_predicted_rate_is_the_exact_one_to_first_order(c_beta: float, c_mu: float, c_alpha: float) -> None:
    """Catches a wrong branch: the relative error of 1 − rate must vanish as 1/√κ."""
    condition_number = torch.tensor([1e6, 1e8, 1e10], dtype=torch.float64)
    settings = theory.recommended_settings(condition_number, c_beta=c_beta, c_mu=c_mu, c_alpha=c_alpha)
    error = ((1 - settings.exact_rate) / (1 - settings.predicted_rate) - 1).abs()
    assert error[-1] < 2e-3
    torch.testing.assert_close(
        error[1:] / error[:-1], torch.full((2,), 0.1, dtype=torch.float64), rtol=0.15, atol=0
    )


def test_default_is_nesterovs_method() -> None:
    """Catches other defaults than documented: μ = 1−β and a rate of 1 − 1/√κ."""
    settings = theory.recommended_settings(10_000.0, 4.0)
    assert settings.mu == pytest.approx(1 - settings.beta)
    assert settings.lr == pytest.approx(0.5 * 100 / 4)
    assert settings.predicted_rate == pytest.approx(0.99)
    assert settings.exact_rate == pytest.approx(
        theory.worst_gain_factor(settings.lr, settings.beta, settings.mu, 4e-4, 4.0), abs=1e-12
    )


@pytest.mark.parametrize("condition_number", [20.0, 1e3, 1e6])
@pytest.mark.parametrize(("c_beta", "c_mu"), [(0.1, 4.0), (1.0, 1.0), (2.0, 3.0), (4.0, 1.0), (4.0, 0.01)])
def test_the_constraint_keeps_the_step_safe(condition_number: float, c_beta: float, c_mu: float) -> None:
    """Catches a constraint that admits divergence; the safe step is kept exactly where c_mu ≥ c_beta."""
    settings = theory.recommended_settings(condition_number, 3.0, c_beta=c_beta, c_mu=c_mu)
    assert settings.lr * 3.0 < theory.convergence_bound(settings.beta, settings.mu)
    assert settings.exact_rate < 1
    safe = theory.largest_safe_step(settings.beta, settings.mu, 3.0)
    assert (settings.lr <= safe * (1 + 1e-12)) is (c_mu >= c_beta)


def test_a_violated_constraint_is_refused() -> None:
    """Catches a step beyond the theorem's range, and β < 0 or μ ≥ 1 from a small condition number."""
    theory.recommended_settings(1e4, c_beta=1.0, c_mu=2.0, c_alpha=2 / 3)
    with pytest.raises(ValueError, match="c_alpha must not exceed"):
        theory.recommended_settings(1e4, c_beta=1.0, c_mu=2.0, c_alpha=0.667)
    with pytest.raises(ValueError, match="square root of the condition number"):
        theory.recommended_settings(4.0)
    with pytest.raises(ValueError, match="square root of the condition number"):
        theory.recommended_settings(torch.tensor([1e4, 100.0]), c_mu=10.0)
    with pytest.raises(ValueError, match="condition_number must lie in"):
        theory.recommended_settings(0.5)


def test_settings_are_floats_for_numbers_and_tensors_otherwise() -> None:
    """Catches a result that is a tensor where numbers were given, or lost shape or precision."""
    assert all(type(value) is float for value in theory.recommended_settings(10_000))
    settings = theory.recommended_settings(torch.tensor([[1e3], [1e4]]), torch.tensor([1.0, 2.0, 3.0]))
    assert all(value.shape == (2, 3) and value.dtype is torch.float64 for value in settings)
    assert settings.lr[1, 2].item() == pytest.approx(theory.recommended_settings(1e4, 3.0).lr)
    assert math.isclose(settings.beta[1, 0].item(), 0.98)


def test_one_of_several_settings_beyond_the_theorem_is_refused() -> None:
    """Catches a check that only sees a tensor of which every element is wrong."""
    with pytest.raises(ValueError, match="c_alpha must not exceed"):
        theory.recommended_settings(1e4, c_alpha=torch.tensor([0.1, 0.6]))


def test_equal_curvatures_are_a_spectrum_too() -> None:
    """Catches the condition number 1 refused; and of two ends the slower one counts, whichever it is."""
    settings = theory.recommended_settings(1.0, 2.0, c_beta=0.5, c_mu=0.25)
    assert (settings.beta, settings.mu) == (0.5, 0.25)
    assert settings.lr == pytest.approx(2 / 0.75 / 2)
    assert settings.exact_rate == pytest.approx(theory.gain_factor(2 / 0.75, 0.5, 0.25))
    steep = theory.recommended_settings(1.5, 1.0, c_beta=1.2, c_mu=0.0)
    slow, fast = (
        theory.gain_factor(steep.lr * curvature, steep.beta, steep.mu) for curvature in (1.0, 1 / 1.5)
    )
    assert steep.exact_rate == pytest.approx(slow)
    assert slow > 2 * fast
