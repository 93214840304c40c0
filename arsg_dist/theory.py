"""What the theory of the remote stochastic gradient (RSG) answers, as functions.

Setting: a quadratic with curvature λ, minimised by ``m ← β·m + (1−β)·g; x ← x − α·((1−μ)·m + μ·g)``. With τ =
α·λ one step multiplies (x, λ⁻¹·m) by a 2×2 matrix of trace ρ and determinant δ,

    ρ = 1 + β − τ·(1 − β + βμ)        δ = β·(1 − μτ)        χ = ρ² − 4δ

so its eigenvalues are (ρ ± √χ)/2: the setting of Theorem 1 of the ARSG paper (arXiv 1905.01422). ARSG is this
iteration preconditioned by 1/√v̂, so λ then stands for the curvature after preconditioning.

Every function takes Python numbers or tensors (any shapes that broadcast, any real dtype), computes in
float64, and returns a float if all its arguments are numbers and a float64 tensor of the broadcast shape
otherwise. An argument outside its domain raises `ValueError`; the domains are 0 ≤ β < 1, 0 ≤ μ < 1, τ ≥ 0, α
≥ 0, λ > 0, κ ≥ 1.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, overload

import torch
from torch import Tensor

__all__ = [
    "CriticalPoints",
    "RecommendedSettings",
    "base_iterate_variance",
    "boost_ratio",
    "convergence_bound",
    "critical_points",
    "gain_factor",
    "largest_safe_step",
    "observation_distance",
    "optimal_tau",
    "quietest_mu",
    "quietest_mu_of_base_iterate",
    "recommended_settings",
    "stationary_variance",
    "worst_gain_factor",
]

Value = float | Tensor


class _Domain(NamedTuple):
    low: float
    low_included: bool
    high: float  # never included

    def __str__(self) -> str:
        return f"{'[' if self.low_included else '('}{self.low:g}, {self.high:g})"

    def contains(self, value: Tensor) -> bool:
        above = value >= self.low if self.low_included else value > self.low
        return bool((above & (value < self.high)).all())  # false for NaN


_UNIT = _Domain(0.0, True, 1.0)
_NON_NEGATIVE = _Domain(0.0, True, math.inf)
_POSITIVE = _Domain(0.0, False, math.inf)
_DOMAINS: Mapping[str, _Domain] = {
    "tau": _NON_NEGATIVE,
    "lr": _NON_NEGATIVE,
    "beta": _UNIT,
    "mu": _UNIT,
    "mu_from": _UNIT,
    "mu_to": _UNIT,
    "lambda_min": _POSITIVE,
    "lambda_max": _POSITIVE,
    "curvature": _POSITIVE,
    "noise": _NON_NEGATIVE,
    "condition_number": _Domain(1.0, True, math.inf),
    "c_beta": _POSITIVE,
    "c_mu": _NON_NEGATIVE,
    "c_alpha": _POSITIVE,
}


def _checked(arguments: Mapping[str, Value]) -> dict[str, Tensor]:
    """Return the arguments as float64 tensors broadcast together, each checked against its name's domain."""
    device = next((value.device for value in arguments.values() if isinstance(value, Tensor)), None)
    tensors: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and (value.is_complex() or value.dtype is torch.bool):
            raise TypeError(f"{name} must be real numbers, got a tensor of {value.dtype}")
        if not isinstance(value, Tensor | float | int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        tensors[name] = torch.as_tensor(value, dtype=torch.float64, device=device)
        if not _DOMAINS[name].contains(tensors[name]):
            raise ValueError(f"{name} must lie in {_DOMAINS[name]}, got {value}")
    broadcast = torch.broadcast_tensors(*tensors.values())  # type: ignore[no-untyped-call]
    return dict(zip(tensors, broadcast, strict=True))


class _Elementwise(Protocol):
    """A function of numbers or tensors; the argument names are those of the wrapped function."""

    @overload
    def __call__(self, *args: float, **kwargs: float) -> float: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, *args: Value, **kwargs: Value) -> Tensor: ...


def _elementwise(function: Callable[..., Tensor]) -> _Elementwise:
    """Let a function of float64 tensors accept numbers as well, and check its arguments' domains."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Value, **kwargs: Value) -> Value:
        arguments = signature.bind(*args, **kwargs).arguments
        result = function(**_checked(arguments))
        return result if any(isinstance(a, Tensor) for a in arguments.values()) else result.item()

    return wrapper  # type: ignore[return-value]


class CriticalPoints(NamedTuple):
    """The two τ at which the eigenvalues coincide (χ = 0); between them they are complex."""

    minus: Value
    plus: Value


class RecommendedSettings(NamedTuple):
    """Hyper-parameters for a quadratic of known condition number; see `recommended_settings`."""

    lr: Value
    """α = c_α·√κ/λ_max, the learning rate."""
    beta: Value
    """β = 1 − c_β/√κ, the decay rate of the first moment."""
    mu: Value
    """μ = c_μ/√κ, the observation factor."""
    predicted_rate: Value
    """Theorem 1's rate of convergence per step, to first order in 1/√κ."""
    exact_rate: Value
    """The largest gain factor on [λ_max/κ, λ_max], no approximation."""


def _slope(beta: Tensor, mu: Tensor) -> Tensor:
    """−dρ/dτ = 1 − β + βμ; also 1 − s² with s = √(β(1−μ))."""
    return 1 - beta + beta * mu


def _critical(beta: Tensor, mu: Tensor, sign: int) -> Tensor:
    # The published form (1−β)(1+β−βμ ± 2s)/(1−β+βμ)² has 1+β−βμ ± 2s = (1±s)²; as a square it does not cancel
    # for "+". For "−" the product τ₋·τ₊ = ((1−β)/(1−β+βμ))² gives (1−β)/(1+s)², which does not cancel either.
    s = (beta * (1 - mu)).sqrt()
    if sign < 0:
        return (1 - beta) / (1 + s) ** 2
    return (1 - beta) * ((1 + s) / _slope(beta, mu)) ** 2


def _gain(tau: Tensor, beta: Tensor, mu: Tensor) -> Tensor:
    rho = 1 + beta - tau * _slope(beta, mu)
    # χ from its two zeros: ρ² − 4δ would lose half of the digits near them.
    discriminant = _slope(beta, mu) ** 2 * (tau - _critical(beta, mu, -1)) * (tau - _critical(beta, mu, +1))
    real = (rho.abs() + discriminant.clamp(min=0).sqrt()) / 2
    modulus_of_conjugates = (beta * (1 - mu * tau)).clamp(min=0).sqrt()
    return torch.where(discriminant < 0, modulus_of_conjugates, real)


@_elementwise
def gain_factor(tau: Tensor, beta: Tensor, mu: Tensor) -> Tensor:
    """Return r(τ), the factor by which one step of RSG shrinks the error on a quadratic (Theorem 1).

    r is the spectral radius of the iteration matrix: √(β(1−μτ)) where χ < 0 (complex conjugates), else
    (|ρ| + √χ)/2. It falls from 1 at τ = 0 to its minimum at `optimal_tau` and rises from there on; the
    iteration converges where r < 1, that is for 0 < τ < `convergence_bound`.

    Args:
        tau: τ = α·λ, the learning rate times the curvature; no unit, ≥ 0.
        beta: decay rate β of the first moment, in [0, 1).
        mu: observation factor μ, in [0, 1).

    Raises:
        ValueError: an argument is outside its domain.
    """
    return _gain(tau, beta, mu)


@_elementwise
def convergence_bound(beta: Tensor, mu: Tensor) -> Tensor:
    """Return the τ below which RSG converges: 2(1+β)/(1−β+2βμ) (Theorem 1).

    At the bound itself an eigenvalue is −1.

    Args:
        beta: decay rate β of the first moment, in [0, 1).
        mu: observation factor μ, in [0, 1).

    Raises:
        ValueError: an argument is outside its domain.
    """
    return 2 * (1 + beta) / (1 - beta + 2 * beta * mu)


@_elementwise
def optimal_tau(beta: Tensor, mu: Tensor) -> Tensor:
    """Return the τ at which the gain factor is smallest: the upper critical point τ_cb+.

    τ_cb+ = (1−β)(1+β−βμ+2s)/(1−β+βμ)² = (1−β)/(1−s)² with s = √(β(1−μ)), where r = |β−s|/(1−s). The minimum
    is unique for β > 0 and μ > 0. For μ = 0 (heavy ball) r = √β on the whole interval between the critical
    points, and this is its upper end.

    Args:
        beta: decay rate β of the first moment, in [0, 1).
        mu: observation factor μ, in [0, 1).

    Raises:
        ValueError: an argument is outside its domain.
    """
    return _critical(beta, mu, +1)


@_elementwise
def _lower_critical_tau(beta: Tensor, mu: Tensor) -> Tensor:
    return _critical(beta, mu, -1)


def critical_points(beta: Value, mu: Value) -> CriticalPoints:
    """Return the two τ with χ = 0: τ_cb± = (1−β)(1+β−βμ ± 2√(β(1−μ)))/(1−β+βμ)².

    τ_cb+ minimises the gain factor (see `optimal_tau`). τ_cb- does not: it is where the eigenvalues turn
    complex and r changes from falling steeply to falling as √(β(1−μτ)). The two coincide for β = 0.

    Args:
        beta: decay rate β of the first moment, in [0, 1).
        mu: observation factor μ, in [0, 1).

    Returns:
        The pair (minus, plus), minus ≤ plus.

    Raises:
        ValueError: an argument is outside its domain.
    """
    return CriticalPoints(_lower_critical_tau(beta, mu), optimal_tau(beta, mu))


@_elementwise
def boost_ratio(beta: Tensor, mu_from: Tensor, mu_to: Tensor) -> Tensor:
    """Return the factor for the learning rate when μ is changed: τ_cb+(β, mu_to)/τ_cb+(β, mu_from).

    This keeps the curvature at which the gain factor is smallest where it was (the observation boost). It is
    below 1 if μ rises; for β = 0.999 it is 0.248 for 0.05 → 0.1 (the paper rounds to 1/4) and 0.239 for 0.1 →
    0.2.

    Args:
        beta: decay rate β of the first moment, in [0, 1).
        mu_from: observation factor before, in [0, 1).
        mu_to: observation factor after, in [0, 1).

    Raises:
        ValueError: an argument is outside its domain.
    """
    return _critical(beta, mu_to, +1) / _critical(beta, mu_from, +1)


@_elementwise
def largest_safe_step(beta: Tensor, mu: Tensor, lambda_max: Tensor) -> Tensor:
    """Return the learning rate (1+β)/((1−β+βμ)·λ_max) up to which the theory calls a step safe (Theorem 1).

    At this α the two eigenvalues of the largest curvature sum to zero (ρ = 0); it is always below
    `convergence_bound`/λ_max, and for μ > 1−β it is above `optimal_tau`/λ_max.

    Args:
        beta: decay rate β of the first moment, in [0, 1).
        mu: observation factor μ, in [0, 1).
        lambda_max: largest curvature (after preconditioning, for ARSG), > 0; unit 1/lr.

    Raises:
        ValueError: an argument is outside its domain.
    """
    return (1 + beta) / (_slope(beta, mu) * lambda_max)


@_elementwise
def worst_gain_factor(lr: Tensor, beta: Tensor, mu: Tensor, lambda_min: Tensor, lambda_max: Tensor) -> Tensor:
    """Return the rate of convergence: the largest gain factor on [lambda_min, lambda_max].

    r(τ) falls and then rises, so the largest is at one of the ends.

    Args:
        lr: learning rate α, ≥ 0.
        beta: decay rate β of the first moment, in [0, 1).
        mu: observation factor μ, in [0, 1).
        lambda_min: smallest curvature, > 0; unit 1/lr.
        lambda_max: largest curvature, ≥ lambda_min; unit 1/lr.

    Raises:
        ValueError: an argument is outside its domain, or lambda_min > lambda_max.
    """
    if bool((lambda_min > lambda_max).any()):
        raise ValueError("lambda_min must not exceed lambda_max")
    return torch.maximum(_gain(lr * lambda_min, beta, mu), _gain(lr * lambda_max, beta, mu))


@_elementwise
def observation_distance(beta: Tensor, mu: Tensor) -> Tensor:
    """Return η = μβ/(1−β): how many base steps the remote observation point runs ahead of the base iterate.

    The optimizer keeps the parameters at x = θ − α·η·m/√v̂. μ = 0.1, β = 0.999 gives η = 99.9; μ = 1−β is
    Nesterov's point (η = β).

    Args:
        beta: decay rate β of the first moment, in [0, 1).
        mu: observation factor μ, in [0, 1).

    Raises:
        ValueError: an argument is outside its domain.
    """
    return mu * beta / (1 - beta)


@_elementwise
def stationary_variance(lr: Tensor, beta: Tensor, mu: Tensor, curvature: Tensor, noise: Tensor) -> Tensor:
    """Return the variance of x that noisy gradients keep up on a quadratic, once the start is forgotten.

    With gradients λx + σξ, ξ independent of mean 0 and variance 1, x is an ARMA(2, 1) process of variance

        (ασ²/λ)·(1 − β² + τβμ(1−β+2βμ)) / ((1 − β + βμτ)·(2(1+β) − τ(1−β+2βμ)))        τ = αλ

    of which λ/2 is the loss that the noise costs. It is ασ²/(2λ) for small τ whatever β and μ are, and proportional to
    σ²: which β and μ are best does not depend on the noise, nor on the batch, at a given α.

    Args:
        lr: learning rate α, ≥ 0.
        beta: decay rate β of the first moment, in [0, 1).
        mu: observation factor μ, in [0, 1).
        curvature: λ (after preconditioning, for ARSG), > 0; unit 1/lr.
        noise: standard deviation σ of a gradient, ≥ 0; proportional to one over the root of the batch.

    Raises:
        ValueError: an argument is outside its domain, or τ is not below `convergence_bound`.
    """
    tau, b = lr * curvature, 1 + beta
    a, p = 1 - beta, beta * mu
    _require_convergence(tau, beta, mu)
    numerator = a * b + tau * p * (a + 2 * p)
    return lr * noise**2 / curvature * numerator / ((a + tau * p) * (2 * b - tau * (a + 2 * p)))


@_elementwise
def base_iterate_variance(lr: Tensor, beta: Tensor, mu: Tensor, curvature: Tensor, noise: Tensor) -> Tensor:
    """Return the variance of the base iterate θ in the setting of `stationary_variance`.

    θ is an AR(2) process of variance (ασ²/λ)·(1−β)(1+β−βμτ) / ((1 − β + βμτ)·(2(1+β) − τ(1−β+2βμ))), never above that
    of x: it averages over some 1/(1−β) steps. `ARSG.base_iterate` moves the parameters there.

    Args:
        lr: learning rate α, ≥ 0.
        beta: decay rate β of the first moment, in [0, 1).
        mu: observation factor μ, in [0, 1).
        curvature: λ (after preconditioning, for ARSG), > 0; unit 1/lr.
        noise: standard deviation σ of a gradient, ≥ 0.

    Raises:
        ValueError: an argument is outside its domain, or τ is not below `convergence_bound`.
    """
    tau, b = lr * curvature, 1 + beta
    a, p = 1 - beta, beta * mu
    _require_convergence(tau, beta, mu)
    return lr * noise**2 / curvature * a * (b - tau * p) / ((a + tau * p) * (2 * b - tau * (a + 2 * p)))


@_elementwise
def quietest_mu(tau: Tensor, beta: Tensor) -> Tensor:
    """Return the μ with the least `stationary_variance` of x for a given τ and β; the noise plays no part in it.

    About (√(1+βκ) − 1)/(βκ) with κ = τ/(1−β): 1/2 for flat directions, where it matters little, and 1/√κ for steep
    ones. Never above 1/2; 0 for β ≤ 1/3 and little curvature, where no observation ahead is less noisy.

    Args:
        tau: τ = α·λ, the learning rate times the curvature; no unit, ≥ 0.
        beta: decay rate β of the first moment, in [0, 1).

    Raises:
        ValueError: an argument is outside its domain, or no μ converges, τ ≥ 2(1+β)/(1−β).
    """
    a, b = 1 - beta, 1 + beta
    _require_convergence(tau, beta, torch.zeros_like(beta))
    # The derivative's zero: 4τβp² + 4a(b+βτ)p + a(b(1−3β)+aβτ) = 0 for p = βμ, in the form that does not cancel.
    half, constant = 2 * a * (b + beta * tau), a * (b * (1 - 3 * beta) + a * beta * tau)
    p = -constant / (half + (half**2 - 4 * tau * beta * constant).clamp(min=0).sqrt())
    return torch.where(beta > 0, p / beta.clamp(min=1e-300), torch.zeros_like(p)).clamp(0.0, 1.0)


@_elementwise
def quietest_mu_of_base_iterate(tau: Tensor, beta: Tensor) -> Tensor:
    """Return the μ with the least `base_iterate_variance` for a given τ and β; the noise plays no part in it.

    (1 + β − √(τ(1−β)))/(βτ), and 1 where that is more: θ averages, so that its noise falls with μ nearly up to the
    `convergence_bound`. 1 itself is outside the domain of μ; it stands for as much as there is.

    Args:
        tau: τ = α·λ, the learning rate times the curvature; no unit, ≥ 0.
        beta: decay rate β of the first moment, in [0, 1).

    Raises:
        ValueError: an argument is outside its domain, or no μ converges, τ ≥ 2(1+β)/(1−β).
    """
    _require_convergence(tau, beta, torch.zeros_like(beta))
    mu = (1 + beta - (tau * (1 - beta)).sqrt()) / (beta * tau).clamp(min=1e-300)
    return mu.clamp(0.0, 1.0)


def _require_convergence(tau: Tensor, beta: Tensor, mu: Tensor) -> None:
    bound = convergence_bound(beta, mu)
    if bool((tau >= bound).any()):
        raise ValueError(
            f"lr times curvature, {tau.max().item():g}, is not below the convergence bound {bound.min().item():g}: "
            "there is no stationary state; lower lr"
        )


def recommended_settings(
    condition_number: Value,
    lambda_max: Value = 1.0,
    *,
    c_beta: Value = 2.0,
    c_mu: Value = 2.0,
    c_alpha: Value | None = None,
) -> RecommendedSettings:
    """Return learning rate, β and μ for a condition number κ, with the rate they give (Theorem 1).

    β = 1 − c_β/√κ, μ = c_μ/√κ, α = c_α·√κ/λ_max with c_α ≤ 2/(c_β + c_μ), which keeps α below the convergence
    bound, and within `largest_safe_step` if c_μ ≥ c_β. The predicted rate is
    1 − c_β/(2√κ) if 4c_α ≥ c_β, else 1 − (c_β − √(c_β(c_β − 4c_α)))/(2√κ). It is the gain factor of the
    smallest curvature to first order in 1/√κ; the next term is of order 1/κ, but κ^(−3/4) at 4c_α = c_β, and
    for small κ or c_μ much smaller than c_β the largest curvature can be the slower one: `exact_rate` has no
    such limits.

    The default c_β = c_μ = 2, c_α = 1/2 is Nesterov's method (μ = 1−β) and predicts 1 − 1/√κ. With noisy
    gradients a c_μ far above c_β is what the paper trains with: β = 0.999, μ = 0.1 is c_μ = 100·c_β.

    Args:
        condition_number: κ = λ_max/λ_min, ≥ 1; must exceed c_beta² and c_mu², so that β > 0 and μ < 1.
        lambda_max: largest curvature (after preconditioning, for ARSG), > 0; unit 1/lr.
        c_beta: c_β > 0.
        c_mu: c_μ ≥ 0.
        c_alpha: c_α > 0; None (default) takes the largest allowed, 2/(c_beta + c_mu).

    Raises:
        ValueError: an argument is outside its domain, or c_alpha > 2/(c_beta + c_mu).
    """
    given: dict[str, Value] = {
        "condition_number": condition_number,
        "lambda_max": lambda_max,
        "c_beta": c_beta,
        "c_mu": c_mu,
    }
    if c_alpha is not None:
        given["c_alpha"] = c_alpha
    checked = _checked(given)
    root = checked["condition_number"].sqrt()
    cb, cm = checked["c_beta"], checked["c_mu"]
    if bool((cb >= root).any()) or bool((cm >= root).any()):
        raise ValueError("c_beta and c_mu must be below the square root of the condition number")
    largest = 2 / (cb + cm)
    ca = checked.get("c_alpha", largest)
    if bool((ca > largest * (1 + 1e-12)).any()):
        raise ValueError(f"c_alpha must not exceed 2/(c_beta + c_mu) = {largest}, got {c_alpha}")
    lr, beta, mu = ca * root / checked["lambda_max"], 1 - cb / root, cm / root
    predicted = 1 - (cb - (cb * (cb - 4 * ca)).clamp(min=0).sqrt()) / (2 * root)
    exact = torch.maximum(_gain(ca / root, beta, mu), _gain(ca * root, beta, mu))
    settings = (lr, beta, mu, predicted, exact)
    if any(isinstance(value, Tensor) for value in given.values()):
        return RecommendedSettings(*settings)
    return RecommendedSettings(*(value.item() for value in settings))
