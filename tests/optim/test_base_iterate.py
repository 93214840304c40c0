"""base_iterate(): to θ and back."""

from __future__ import annotations

import copy

import pytest
import torch

from arsg_dist import ARSG
from tests.optim.optim_paths import MODES, assert_close, gradients, parameters, run

SHAPES = [(5,), (2, 3)]


def trained(mode: str = "amsgrad", steps: int = 10, dtype: torch.dtype = torch.float64, **settings):
    params = parameters(SHAPES, dtype=dtype)
    optimizer = ARSG(params, lr=0.05, betas=(0.9, 0.99), eps=1e-3, mu=0.3, preconditioner=mode, **settings)
    run(optimizer, params, gradients(SHAPES, steps, dtype=dtype))
    return optimizer, params


@pytest.mark.parametrize("mode", MODES)
def test_theta_is_x_plus_alpha_eta_times_the_preconditioned_moment(mode: str) -> None:
    """Catches a wrong denominator per preconditioner."""
    optimizer, params = trained(mode)
    xs = [x.detach().clone() for x in params]
    with optimizer.base_iterate():
        for x, before in zip(params, xs, strict=True):
            state = optimizer.state[x]
            direction = state["exp_avg"]
            if mode == "amsgrad":
                direction = direction / state["max_exp_avg_sq"].sqrt()
            elif mode == "adam":
                root = (state["exp_avg_sq"] / (1 - 0.99**10)).sqrt()
                direction = direction / (1 - 0.9**10) / (root + 1e-3)
            assert_close(x.detach() - before, 0.05 * 0.3 * 0.9 / 0.1 * direction, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("raising", [False, True])
def test_x_is_restored_bit_by_bit(dtype: torch.dtype, raising: bool) -> None:
    """Catches a return by subtraction, and a missing return when evaluation fails."""
    optimizer, params = trained(dtype=dtype)
    before = [x.detach().clone() for x in params]
    try:
        with optimizer.base_iterate():
            assert all(not torch.equal(x, old) for x, old in zip(params, before, strict=True))
            if raising:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(x, old) for x, old in zip(params, before, strict=True))
    run(optimizer, params, gradients(SHAPES, 1, dtype=dtype))  # and the optimizer may step again


def test_an_error_on_the_way_to_theta_restores_what_has_moved() -> None:
    """Catches parameters left half way when one state is incomplete."""
    optimizer, params = trained()
    before = [x.detach().clone() for x in params]
    del optimizer.state[params[1]]["max_exp_avg_sq"]
    with pytest.raises(RuntimeError, match="max_exp_avg_sq"), optimizer.base_iterate():
        pass
    assert all(torch.equal(x, old) for x, old in zip(params, before, strict=True))


def test_training_is_unaffected_by_visits_to_theta() -> None:
    """Catches state touched by the visit."""
    visited, visited_params = trained(steps=0)
    straight, straight_params = trained(steps=0)
    for grads in gradients(SHAPES, 6):
        run(visited, visited_params, [grads])
        run(straight, straight_params, [grads])
        with visited.base_iterate():
            pass
    assert all(torch.equal(x, y) for x, y in zip(visited_params, straight_params, strict=True))


def test_the_last_steps_lr_counts_not_the_schedulers_next() -> None:
    """Catches α read when θ is asked for: by then a scheduler has set the next one; also after a reload."""
    optimizer, params = trained()
    with optimizer.base_iterate():
        expected = [x.detach().clone() for x in params]
    optimizer.param_groups[0].update(lr=123.0, mu=0.9)
    reloaded_params = [torch.nn.Parameter(x.detach().clone()) for x in params]
    reloaded = ARSG(reloaded_params)
    reloaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for some, some_params in ((optimizer, params), (reloaded, reloaded_params)):
        with some.base_iterate():
            assert all(torch.equal(x, theta) for x, theta in zip(some_params, expected, strict=True))


def test_ascent_has_its_base_iterate_behind_it_too() -> None:
    """Catches the sign: with maximize x runs ahead uphill, so θ lies downhill of x."""
    x = torch.nn.Parameter(torch.zeros(3))
    optimizer = ARSG([x], maximize=True, mu=0.3)
    run(optimizer, [x], [[torch.ones(3)]] * 3)
    uphill = x.detach().clone()
    assert (uphill > 0).all()
    with optimizer.base_iterate():
        assert (x < uphill).all()
        assert (x > 0).all()


def test_parameters_without_state_stay() -> None:
    """Catches a KeyError for frozen or unused parameters, and for an optimizer that never stepped."""
    frozen, used = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = ARSG([frozen, used])
    with optimizer.base_iterate():
        assert torch.equal(used, torch.ones(2))
    used.grad = torch.ones(2)
    optimizer.step()
    with optimizer.base_iterate():
        assert torch.equal(frozen, torch.ones(2))
    assert frozen not in optimizer.state


def test_step_load_and_nesting_inside_are_refused() -> None:
    """Catches a step from θ, whose result the return to x would throw away."""
    optimizer, _ = trained()
    saved = optimizer.state_dict()
    with optimizer.base_iterate():
        with pytest.raises(RuntimeError, match="base_iterate"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="base_iterate"):
            optimizer.load_state_dict(saved)
        with pytest.raises(RuntimeError, match="base_iterate"), optimizer.base_iterate():
            pass
        with pytest.raises(RuntimeError, match="base_iterate"):
            optimizer.step()  # the refused nested use has not lifted the guard
    optimizer.step()


def test_tensor_lr_is_recorded_in_place() -> None:
    """Catches a scale rebound every step, which a captured graph would not find."""
    params = parameters(SHAPES)
    optimizer = ARSG(params, lr=torch.tensor(0.05), betas=(0.9, 0.99), mu=0.3, capturable=True)
    grads = gradients(SHAPES, 2)
    run(optimizer, params, grads[:1])
    scale = optimizer.param_groups[0]["base_iterate_scale"]
    optimizer.param_groups[0]["lr"].fill_(0.1)
    run(optimizer, params, grads[1:])
    assert optimizer.param_groups[0]["base_iterate_scale"] is scale
    assert scale.item() == pytest.approx(0.1 * 2.7)


def test_the_floor_counts_when_theta_is_asked_for() -> None:
    """Catches v̂ taken as it lies in the state: sharded padding comes back as 0, and ε may have been raised since."""
    x = torch.nn.Parameter(torch.ones(4))
    optimizer = ARSG([x], lr=0.1, betas=(0.9, 0.99), mu=0.3)
    run(optimizer, [x], [[torch.zeros(4)]])
    optimizer.state[x]["max_exp_avg_sq"].zero_()
    with optimizer.base_iterate():
        assert torch.equal(x, torch.ones(4))
    run(optimizer, [x], [[torch.ones(4)]])
    before = x.detach().clone()
    optimizer.param_groups[0]["eps"] = 4.0
    with optimizer.base_iterate():  # η = 2.7, m = 0.1, √v̂ = 2
        assert_close(x.detach() - before, torch.full((4,), 0.1 * 2.7 * 0.1 / 2), 1e-5)


def test_a_group_that_makes_no_step_keeps_the_alpha_of_its_last_one() -> None:
    """Catches α·η of the first group for all, only the first group moved, and one recorded without a step."""
    first, second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = ARSG([{"params": [first]}, {"params": [second], "lr": 0.1}], lr=0.01)
    run(optimizer, [first, second], [[torch.ones(1), torch.ones(1)]])
    optimizer.param_groups[1]["lr"] = 1.0
    second.grad = None
    optimizer.step()
    # m = 0.001, √v̂ = 0.1 and η = 99.9: x = 1 − 0.1·(0.9·0.001 + 0.1)/0.1 = 0.8991.
    assert second.item() == pytest.approx(0.8991, rel=1e-5)
    with optimizer.base_iterate():
        assert second.item() == pytest.approx(0.8991 + 0.1 * 99.9 * 0.001 / 0.1, rel=1e-5)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_nothing_lies_between_x_and_theta_where_nothing_is_averaged(beta1: float) -> None:
    """Catches a distance of μ/(1 − β1), which is not 0 for β1 = 0."""
    x = torch.nn.Parameter(torch.ones(1))
    optimizer = ARSG([x], lr=0.1, betas=(beta1, 0.99), mu=0.5, preconditioner="none")
    run(optimizer, [x], [[torch.ones(1)]])
    before = x.item()
    with optimizer.base_iterate():  # m = 1 − β1
        assert x.item() - before == pytest.approx(0.1 * 0.5 * beta1, abs=1e-6)
