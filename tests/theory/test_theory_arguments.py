"""Numbers and tensors as arguments, and the domains."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from arsg_dist import theory

FUNCTIONS: list[tuple[Callable[..., Any], dict[str, float]]] = [
    (theory.gain_factor, {"tau": 1.0, "beta": 0.9, "mu": 0.1}),
    (theory.convergence_bound, {"beta": 0.9, "mu": 0.1}),
    (theory.critical_points, {"beta": 0.9, "mu": 0.1}),
    (theory.optimal_tau, {"beta": 0.9, "mu": 0.1}),
    (theory.boost_ratio, {"beta": 0.9, "mu_from": 0.1, "mu_to": 0.2}),
    (theory.largest_safe_step, {"beta": 0.9, "mu": 0.1, "lambda_max": 2.0}),
    (
        theory.worst_gain_factor,
        {"lr": 1.0, "beta": 0.9, "mu": 0.1, "lambda_min": 0.5, "lambda_max": 2.0},
    ),
    (theory.observation_distance, {"beta": 0.9, "mu": 0.1}),
    (
        theory.recommended_settings,
        {"condition_number": 1e4, "lambda_max": 2.0, "c_beta": 1.0, "c_mu": 2.0, "c_alpha": 0.5},
    ),
]
ids = [function.__name__ for function, _ in FUNCTIONS]


def parts(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("function", "arguments"), FUNCTIONS, ids=ids)
def test_numbers_give_floats(function: Callable[..., Any], arguments: dict[str, float]) -> None:
    """Catches a 0-dim tensor returned where a number is promised."""
    assert all(type(part) is float for part in parts(function(**arguments)))


@pytest.mark.parametrize(("function", "arguments"), FUNCTIONS, ids=ids)
def test_each_argument_may_be_a_tensor(function: Callable[..., Any], arguments: dict[str, float]) -> None:
    """Catches an argument that is not broadcast, or a computation in the input's low precision."""
    expected = parts(function(**arguments))
    for name in arguments:
        value = torch.full((2, 1), arguments[name], dtype=torch.float64)
        for part, number in zip(parts(function(**{**arguments, name: value})), expected, strict=True):
            assert part.dtype is torch.float64
            torch.testing.assert_close(part, torch.full((2, 1), number, dtype=torch.float64))
    shapes = [(3, 1), (1, 2), (1, 1), (2,), ()]
    tensors = {
        name: torch.full(shape, value, dtype=torch.float64)
        for (name, value), shape in zip(arguments.items(), shapes, strict=False)
    }
    assert all(part.shape == (3, 2) for part in parts(function(**tensors)))


def test_low_precision_arguments_are_computed_in_float64() -> None:
    """Catches bfloat16 arithmetic: 1 − β would have two digits."""
    tau, beta = torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(0.99609375, dtype=torch.bfloat16)
    assert theory.gain_factor(tau, beta, 0.05).item() == theory.gain_factor(1.5, 0.99609375, 0.05)


OUTSIDE: dict[str, list[float]] = {
    "tau": [-1e-9, float("inf"), float("nan")],
    "lr": [-1.0],
    "beta": [-0.1, 1.0, float("nan")],
    "mu": [-0.1, 1.0],
    "mu_from": [1.0],
    "mu_to": [1.0, 1.2],
    "lambda_min": [0.0, -1.0],
    "lambda_max": [0.0, float("inf")],
    "condition_number": [0.99],
    "c_beta": [0.0],
    "c_mu": [-1.0],
    "c_alpha": [0.0],
}


@pytest.mark.parametrize(("function", "arguments"), FUNCTIONS, ids=ids)
def test_arguments_outside_their_domain_are_refused(
    function: Callable[..., Any], arguments: dict[str, float]
) -> None:
    """Catches an argument that is not validated, alone or as one element of a tensor."""
    for name in arguments:
        for value in OUTSIDE[name]:
            with pytest.raises(ValueError, match=f"{name} must lie in"):
                function(**{**arguments, name: value})
            with pytest.raises(ValueError, match=f"{name} must lie in"):
                function(**{**arguments, name: torch.tensor([arguments[name], value])})


@pytest.mark.parametrize("value", ["0.5", None, True, torch.tensor(True), torch.tensor(0.5j)])
def test_arguments_that_are_no_real_numbers_are_refused(value: Any) -> None:
    """Catches a string, flag or complex number taken for a hyper-parameter."""
    with pytest.raises(TypeError, match="beta must be"):
        theory.convergence_bound(value, 0.1)


def test_an_empty_spectrum_is_refused() -> None:
    """Catches exchanged curvatures, which would hide the worse end."""
    with pytest.raises(ValueError, match="lambda_min must not exceed"):
        theory.worst_gain_factor(1.0, 0.9, 0.1, 2.0, 1.0)


def test_names_and_documentation_survive_the_wrapping() -> None:
    """Catches a decorator that hides the signature from help() and editors."""
    assert theory.gain_factor.__name__ == "gain_factor"  # type: ignore[attr-defined]
    assert "Theorem 1" in (theory.gain_factor.__doc__ or "")
    assert theory.gain_factor(mu=0.1, tau=1.0, beta=0.9) == theory.gain_factor(1.0, 0.9, 0.1)


def test_one_empty_spectrum_of_several_is_refused() -> None:
    """Catches a check that only sees a tensor of which every element is wrong."""
    with pytest.raises(ValueError, match="lambda_min must not exceed"):
        theory.worst_gain_factor(1.0, 0.9, 0.1, torch.tensor([0.5, 2.0]), 1.0)
