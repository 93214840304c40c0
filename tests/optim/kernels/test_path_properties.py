"""Properties that hold for any tensors: every path makes the reference's update, whatever the tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arsg_dist import ARSG
from tests.optim.optim_paths import FAST_PATHS, PATHS, Path, gradients, parameters, run

QUICK = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)
layouts = st.sampled_from(["contiguous", "transposed", "strided", "offset", "channels_last"])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
# Relative to the largest element; half precision may round to the neighbour.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@st.composite
def tensors(draw):
    """(shape, layout of the parameter, layout of the gradient, dtype)"""
    return draw(shapes), draw(layouts), draw(layouts), draw(dtypes)


@st.composite
def hypers(draw):
    unit = st.floats(0.0, 0.99)
    preconditioner = draw(st.sampled_from(["amsgrad", "adam", "none"]))
    decoupled = draw(st.booleans())
    corrections = ["both", "second", "none"] if preconditioner == "adam" else ["both"]
    return {
        "lr": draw(st.sampled_from([0.0, 1e-3, 0.1])),
        "betas": (draw(unit), draw(unit)),
        "mu": draw(unit),
        "eps": draw(st.sampled_from([0.0, 1e-8, 1e-3, 1.0])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "preconditioner": preconditioner,
        "decoupled_weight_decay": decoupled,
        "cautious_weight_decay": decoupled and draw(st.booleans()),
        "bias_correction": draw(st.sampled_from(corrections)),
        "precondition_first": draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "lookahead_k": draw(st.sampled_from([0, 2])),
    }


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    shape = values.shape
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and values.dim() >= 1:
        room = values.new_zeros((*shape[:-1], 2 * shape[-1]))
        room[..., ::2] = values
        return room[..., ::2]
    if layout == "offset":
        room = values.new_zeros(values.numel() + 3)
        room[3:] = values.flatten()
        return room[3:].view(shape)
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values.clone()


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn((*shape, 2), generator=generator, dtype=torch.float64)
    return torch.view_as_complex(real).to(dtype) if dtype.is_complex else real[..., 0].to(dtype)


def steps_of(optimizer: ARSG, params, grad_layouts, steps: int = 3) -> None:
    for t in range(steps):
        for i, (param, layout) in enumerate(zip(params, grad_layouts, strict=True)):
            param.grad = laid_out(random_values(tuple(param.shape), param.dtype, 1000 * t + i), layout)
        optimizer.step()


@pytest.mark.parametrize("path", FAST_PATHS)
@pytest.mark.filterwarnings("ignore:lookahead is not recommended")
@QUICK
@given(specs=st.lists(tensors(), min_size=1, max_size=5), hyper=hypers())
def test_every_path_makes_the_references_update(path: Path, specs, hyper) -> None:
    """Catches a path that assumes contiguous, non-empty, equally typed or equally laid out tensors."""

    def build(**choice):
        params = [
            torch.nn.Parameter(laid_out(random_values(shape, dtype, -1 - i), layout))
            for i, (shape, layout, _, dtype) in enumerate(specs)
        ]
        return ARSG(params, **hyper, **choice), params

    grad_layouts = [layout for _, _, layout, _ in specs]
    reference, expected = build(foreach=False)
    optimizer, actual = build(**path.settings)
    steps_of(reference, expected, grad_layouts)
    steps_of(optimizer, actual, grad_layouts)
    for x, y, (_, _, _, dtype) in zip(actual, expected, specs, strict=True):
        tolerance = TOLERANCE[dtype.to_real()]
        scale = max(1.0, y.abs().max().item()) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * scale)
        assert x.stride() == y.stride()


@pytest.mark.parametrize("path", FAST_PATHS)
@QUICK
@given(
    shape=shapes, layout=layouts, mode=st.sampled_from(["amsgrad", "adam", "none"]), capturable=st.booleans(),
)  # fmt: skip
def test_bfloat16_state_of_every_path_is_the_references(path: Path, shape, layout, mode, capturable) -> None:
    """Catches random bits that depend on the path: replicas may use different ones.

    Equal but for elements whose float32 value differs in the last bits between paths, which may then be
    rounded to the other neighbour.
    """
    states = []
    for choice in ({"foreach": False}, {**path.settings, "capturable": capturable}):
        x = torch.nn.Parameter(laid_out(random_values(shape, torch.float32, 5), layout))
        optimizer = ARSG([x], preconditioner=mode, state_dtype="bfloat16", **choice)
        steps_of(optimizer, [x], [layout], steps=1)
        states.append(optimizer.state[x])
    for name in states[0].keys() - {"step"}:
        different = (states[0][name] != states[1][name]).double().mean().item() if math.prod(shape) else 0.0
        assert different <= 0.05 or (states[0][name] != states[1][name]).sum() <= 1
        torch.testing.assert_close(states[0][name], states[1][name], rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("path", FAST_PATHS)
@QUICK
@given(cut=st.integers(0, 24), mode=st.sampled_from(["amsgrad", "adam", "none"]))
def test_an_update_is_element_by_element(path: Path, cut: int, mode: str) -> None:
    """Catches any dependence on neighbours or on how tensors are cut: shards must move as the whole does."""
    whole = parameters([(24,)])
    parts = [torch.nn.Parameter(part.detach().clone()) for part in whole[0].split([cut, 24 - cut])]
    grads = gradients([(24,)], 4)
    run(ARSG(whole, preconditioner=mode, **path.settings), whole, grads)
    cut_grads = [list(step[0].split([cut, 24 - cut])) for step in grads]
    run(ARSG(parts, preconditioner=mode, **path.settings), parts, cut_grads)
    torch.testing.assert_close(
        torch.cat([p.detach() for p in parts]), whole[0].detach(), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_left_alone(path: Path, maximize: bool) -> None:
    """Catches weight decay or the sign of maximize written into the gradient: users log and accumulate it."""
    for mode in ("amsgrad", "adam", "none"):
        params = parameters([(6,), (2, 2)])
        grads = gradients([(6,), (2, 2)], 1)[0]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        ARSG(params, weight_decay=0.1, maximize=maximize, preconditioner=mode, **path.settings).step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))
