"""Zero, tiny, huge and non-finite numbers; half precision."""

from __future__ import annotations

import pytest
import torch

from arsg_dist import ARSG
from tests.optim.optim_paths import MODES, PATHS, Path, assert_close, gradients, parameters, run

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def denormals(request: pytest.FixtureRequest):
    """Many accelerators treat numbers below the smallest normal one as 0."""
    if not torch.set_flush_denormal(request.param):
        pytest.skip("the CPU cannot flush denormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("denormals")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_eps_zero_and_zero_gradients_change_nothing(path: Path, mode: str, dtype: torch.dtype) -> None:
    """Catches 0/√0, also where the floor is flushed to 0: a dead layer, padding, an engine's trial step."""
    x = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = ARSG([x], eps=0.0, preconditioner=mode, **path.settings)
    run(optimizer, [x], [[torch.zeros(4, dtype=dtype)]] * 3)
    assert torch.equal(x, torch.ones(4, dtype=dtype))
    with optimizer.base_iterate():
        assert torch.equal(x, torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("mode", ["amsgrad", "adam"])
@pytest.mark.parametrize("path", PATHS)
def test_gradients_whose_square_underflows_stay_finite(path: Path, mode: str, state_dtype) -> None:
    """Catches g/√(g²) with g² = 0."""
    x = torch.nn.Parameter(torch.ones(4))
    optimizer = ARSG([x], eps=0.0, preconditioner=mode, state_dtype=state_dtype, **path.settings)
    run(optimizer, [x], [[torch.tensor([1e-30, -1e-38, 1e-44, 0.0])]] * 5)
    assert x.isfinite().all()
    assert (x - 1).abs().max() < 0.01


@pytest.mark.parametrize("mode", ["amsgrad", "adam"])
@pytest.mark.parametrize("path", PATHS)
def test_state_reloaded_as_zeros_is_harmless(path: Path, mode: str) -> None:
    """Catches a floor applied to v̂ only when state is made: sharded padding comes back as 0."""
    x = torch.nn.Parameter(torch.ones(4))
    optimizer = ARSG([x], eps=0.0, preconditioner=mode, **path.settings)
    run(optimizer, [x], [[torch.ones(4)]])
    before = x.detach().clone()
    for name, value in optimizer.state[x].items():
        if name != "step":
            value.zero_()
    run(optimizer, [x], [[torch.zeros(4)]])
    assert torch.equal(x, before)


@pytest.mark.parametrize("path", PATHS)
def test_eps_raised_mid_run_lifts_the_floor_at_once(path: Path) -> None:
    """Catches ε read at state creation only."""
    x = torch.nn.Parameter(torch.ones(4))
    optimizer = ARSG([x], **path.settings)
    run(optimizer, [x], [[torch.full((4,), 0.1)]])
    optimizer.param_groups[0]["eps"] = 4.0
    run(optimizer, [x], [[torch.full((4,), 0.1)]])
    assert (optimizer.state[x]["max_exp_avg_sq"] == 4.0).all()


@pytest.mark.parametrize("path", PATHS)
def test_restart_forgets_the_maximum(path: Path) -> None:
    """Catches a restart to 0 instead of max(v, ε), and one that rebinds state."""
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = ARSG([x], betas=(0.9, 0.5), eps=1e-4, **path.settings)
    run(optimizer, [x], [[torch.tensor([10.0, 0.0])]] + [[torch.tensor([1.0, 0.0])]] * 10)
    v_hat = optimizer.state[x]["max_exp_avg_sq"]
    assert v_hat[0] > 10
    optimizer.restart()
    assert optimizer.state[x]["max_exp_avg_sq"] is v_hat
    assert torch.equal(v_hat, torch.stack([optimizer.state[x]["exp_avg_sq"][0], torch.tensor(1e-4)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_a_non_finite_element_stays_alone(path: Path, mode: str, bad: float) -> None:
    """Catches reductions over elements and finiteness asserts: padding may hold NaN and must not spread."""
    x, y = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    optimizer, other = (ARSG([p], preconditioner=mode, **path.settings) for p in (x, y))
    run(optimizer, [x], [[torch.tensor([1.0, bad, 2.0, 3.0])]] * 2)
    run(other, [y], [[torch.tensor([1.0, 1.0, 2.0, 3.0])]] * 2)
    assert not x[1].isfinite()
    keep = torch.tensor([0, 2, 3])
    assert torch.equal(x[keep], y[keep])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_half_precision_parameters_are_updated_in_float32(path: Path, mode: str, dtype: torch.dtype) -> None:
    """Catches arithmetic or state in half precision: in float16 g² of g = 1e-4 is 0, and so is ε = 1e-8."""
    grads = [[(step[0] * 1e-4).to(dtype)] for step in gradients([(64,)], 1)]
    x, exact = (p[0] for p in (parameters([(64,)], dtype=dtype), parameters([(64,)], dtype=dtype)))
    settings = {"lr": 0.05, "preconditioner": mode}
    optimizer = ARSG([x], **settings, **path.settings)
    run(optimizer, [x], grads)
    exact = torch.nn.Parameter(exact.detach().double())
    reference = ARSG([exact], foreach=False, **settings)
    run(reference, [exact], [[grads[0][0].double()]])
    assert torch.equal(x, exact.detach().to(dtype))
    for name, value in optimizer.state[x].items():
        if name != "step":
            assert value.dtype == torch.float32
            assert_close(value, reference.state[exact][name], 1e-6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("path", PATHS)
def test_lookahead_of_half_precision_parameters_keeps_a_float32_copy(path: Path, k: int) -> None:
    """Catches slow parameters rounded to half precision, where small pulls are lost."""
    x = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = ARSG([x], lookahead_k=k, lookahead_alpha=0.1, betas=(0.9, 0.9), lr=1e-2, **path.settings)
    run(optimizer, [x], [[torch.ones(8, dtype=torch.bfloat16)]] * (2 * k))
    slow = optimizer.state[x]["slow_param"]
    assert slow.dtype == torch.float32
    assert (slow < 1).all()
    assert torch.equal(x, slow.bfloat16())


def test_restart_of_half_precision_parameters_goes_down_to_eps() -> None:
    """Catches a floor of the parameter's dtype: float16 ends at 6e-5, and v̂ would be that large from then on."""
    x = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = ARSG([x], eps=1e-8)
    run(optimizer, [x], [[torch.tensor([1.0, 0.0], dtype=torch.float16)]])
    optimizer.state[x]["exp_avg_sq"].zero_()
    optimizer.restart()
    assert optimizer.state[x]["max_exp_avg_sq"].tolist() == pytest.approx([1e-8, 1e-8])


def test_restart_reaches_every_group_and_complex_parameters() -> None:
    """Catches a restart that ends at the first group without a maximum, and a clamp that complex numbers have not."""
    plain, other = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    z = torch.nn.Parameter(torch.ones(1, dtype=torch.complex64))
    optimizer = ARSG(
        [{"params": [plain], "preconditioner": "none"}, {"params": [other, z]}], betas=(0.9, 0.5), eps=0.25
    )
    run(optimizer, [plain, other, z], [[torch.ones(1), torch.ones(1), torch.full((1,), 2 + 0j)]])
    run(optimizer, [plain, other, z], [[torch.zeros(1)] * 2 + [torch.zeros(1, dtype=torch.complex64)]] * 2)
    assert optimizer.state[other]["max_exp_avg_sq"].item() == 0.5
    optimizer.restart()
    assert optimizer.state[other]["max_exp_avg_sq"].item() == 0.25
    assert optimizer.state[z]["max_exp_avg_sq"].item() == 0.5 + 0.25j  # v = 4·0.5³ beside ε
    assert "max_exp_avg_sq" not in optimizer.state[plain]


@pytest.mark.parametrize("betas", [(0.0, 0.5), (0.5, 0.0)])
def test_a_decay_of_zero_corrects_nothing_where_steps_are_tensors(betas: tuple[float, float]) -> None:
    """Catches the logarithm of 0 in 1 − βᵗ."""
    x, y = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    settings = {"lr": 0.1, "betas": betas, "preconditioner": "adam"}
    tensors, numbers = ARSG([x], capturable=True, foreach=False, **settings), ARSG([y], **settings)
    grads = gradients([(3,)], 3)
    run(tensors, [x], grads)
    run(numbers, [y], grads)
    assert_close(x.detach(), y.detach(), 1e-6)


def test_the_kernel_leaves_tensors_to_the_reference_with_their_own_steps() -> None:
    """Catches the first parameter's step count used for one that the kernel cannot take."""
    dense, strided = parameters([(3,), (4, 3)])
    strided = torch.nn.Parameter(strided.detach()[:, ::2])
    alone = torch.nn.Parameter(strided.detach().clone())
    optimizer, other = (ARSG(p, lr=0.1, preconditioner="adam") for p in ([dense, strided], [alone]))
    for step, (grad, _, for_strided) in enumerate(gradients([(3,), (4, 3), (4, 2)], 5)):
        dense.grad, strided.grad = grad.clone(), for_strided.clone() if step > 2 else None
        optimizer.step()
        if step > 2:
            run(other, [alone], [[for_strided]])
    assert [optimizer.state[p]["step"] for p in (dense, strided)] == [5, 2]
    assert_close(strided.detach(), alone.detach(), 1e-12)


@pytest.mark.usefixtures("denormals")
@pytest.mark.parametrize("path", PATHS)
def test_an_eps_below_the_normal_numbers_is_no_floor(path: Path) -> None:
    """Catches 0/√ε with an ε that is flushed to 0."""
    x = torch.nn.Parameter(torch.ones(4))
    optimizer = ARSG([x], eps=1e-42, **path.settings)
    run(optimizer, [x], [[torch.zeros(4)]] * 2)
    assert torch.equal(x, torch.ones(4))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_whose_square_overflows_moves_as_any_other(path: Path, eps: float) -> None:
    """Catches (1 − β2)·(g·g), infinite where (1 − β2)·g·g is not: that parameter would never move again."""
    x = torch.nn.Parameter(torch.ones(40))
    optimizer = ARSG([x], lr=0.5, betas=(0.0, 0.99), mu=0.0, eps=eps, **path.settings)
    run(optimizer, [x], [[torch.full((40,), 1e20)]])
    torch.testing.assert_close(x.detach(), torch.full((40,), 1 - 0.5 * 10.0))
