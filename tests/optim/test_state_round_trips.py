"""Saving, loading, pickling and copying: nothing lost, nothing rounded, old files still read."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from arsg_dist import ARSG
from tests.optim.optim_paths import (
    CAPTURABLE,
    FOREACH,
    FUSED,
    MODES,
    REFERENCE,
    Path,
    gradients,
    parameters,
    params_of,
    run,
)

SHAPES = [(5,), (2, 3), ()]
PLAIN = params_of(REFERENCE, FOREACH, FUSED, CAPTURABLE)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(dtype: torch.dtype = torch.float32, steps: int = 5, **settings):
    params = parameters(SHAPES, dtype=dtype)
    optimizer = ARSG(params, lr=0.05, betas=(0.9, 0.98), weight_decay=0.01, **settings)
    run(optimizer, params, gradients(SHAPES, steps, dtype=dtype))
    return optimizer, params


def loaded(state_dict, params, **settings):
    copies = [torch.nn.Parameter(x.detach().clone()) for x in params]
    optimizer = ARSG(copies, **settings)
    optimizer.load_state_dict(state_dict)
    return optimizer, copies


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"state_dtype": "bfloat16"}, {"lookahead_k": 3}, {"capturable": True}],
    ids=["plain", "bfloat16 state", "lookahead", "capturable"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(dtype, settings, mode) -> None:
    """Catches state lost or cast to the parameter's dtype (torch's default), and a step count that drifts."""
    if dtype.is_complex and "state_dtype" in settings:
        pytest.skip("refused, tested elsewhere")
    straight, straight_params = trained(dtype, preconditioner=mode, **settings)
    resumed, resumed_params = loaded(through_a_file(straight.state_dict()), straight_params)
    for x, y in zip(straight_params, resumed_params, strict=True):
        assert straight.state[x].keys() == resumed.state[y].keys()
        for name, value in straight.state[x].items():
            other = resumed.state[y][name]
            assert type(other) is type(value)
            if isinstance(value, torch.Tensor):
                assert (other.dtype, other.stride()) == (value.dtype, value.stride())
                assert torch.equal(other, value)
            else:
                assert other == value
    grads = gradients(SHAPES, 5, seed=9, dtype=dtype)
    run(straight, straight_params, grads)
    run(resumed, resumed_params, grads)
    assert all(torch.equal(x, y) for x, y in zip(straight_params, resumed_params, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after", PLAIN)
@pytest.mark.parametrize("before", PLAIN)
def test_a_run_may_change_its_path(before: Path, after: Path, mode: str) -> None:
    """Catches state that only the path that wrote it can read, such as a tensor step for fused."""
    optimizer, params = trained(torch.float64, preconditioner=mode, **before.settings)
    reference, reference_params = trained(torch.float64, preconditioner=mode, foreach=False)
    state_dict = optimizer.state_dict()
    for group in state_dict["param_groups"]:
        group.update({"foreach": None, "fused": None, "capturable": False, **after.settings})
    resumed, resumed_params = loaded(state_dict, params)
    grads = gradients(SHAPES, 5, seed=9)
    run(resumed, resumed_params, grads)
    run(reference, reference_params, grads)
    for x, y in zip(resumed_params, reference_params, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_run_may_move_between_cpu_and_cuda(mode: str) -> None:
    """Catches state left on the device it was saved from."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    straight, straight_params = trained(torch.float64, preconditioner=mode)
    moved_params = [torch.nn.Parameter(x.detach().cuda()) for x in straight_params]
    moved = ARSG(moved_params)
    moved.load_state_dict(copy.deepcopy(straight.state_dict()))
    grads = gradients(SHAPES, 5, seed=9)
    run(straight, straight_params, grads)
    run(moved, moved_params, [[grad.cuda() for grad in step] for step in grads])
    for x, y in zip(straight_params, moved_params, strict=True):
        torch.testing.assert_close(x, y.cpu(), rtol=1e-9, atol=1e-12)


def test_a_state_dict_from_before_a_setting_existed_loads() -> None:
    """Catches a KeyError on files of older releases: missing settings mean their defaults."""
    optimizer, params = trained()
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for name in list(group):
            if name not in ("params", "lr", "betas", "eps", "weight_decay"):
                del group[name]
    resumed, resumed_params = loaded(old, params)
    group = resumed.param_groups[0]
    assert (group["mu"], group["preconditioner"], group["base_iterate_scale"]) == (0.1, "amsgrad", 0.0)
    grads = gradients(SHAPES, 3, dtype=torch.float32)
    run(optimizer, params, grads)
    run(resumed, resumed_params, grads)
    assert all(torch.equal(x, y) for x, y in zip(params, resumed_params, strict=True))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_a_pickled_optimizer_goes_on(duplicate) -> None:
    """Catches attributes that pickling loses, and old pickles that lack a newer setting."""
    optimizer, params = trained(preconditioner="adam")
    del optimizer.param_groups[0]["lookahead_alpha"], optimizer.defaults["lookahead_alpha"]
    twin = duplicate(optimizer)
    optimizer.param_groups[0]["lookahead_alpha"] = 0.5
    assert twin.param_groups[0]["lookahead_alpha"] == twin.defaults["lookahead_alpha"] == 0.5
    twin_params = twin.param_groups[0]["params"]
    grads = gradients(SHAPES, 3, dtype=torch.float32)
    run(optimizer, params, grads)
    run(twin, twin_params, grads)
    assert all(torch.equal(x, y) for x, y in zip(params, twin_params, strict=True))
    with twin.base_iterate():
        pass
    twin.load_state_dict(optimizer.state_dict())
    twin.add_param_group({"params": parameters([(2,)])})


def test_the_dictionary_that_is_loaded_is_left_alone() -> None:
    """Catches shields against torch's casting left behind in the user's dictionary."""
    optimizer, params = trained(torch.bfloat16)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    loaded(saved, params)
    for index, entry in before["state"].items():
        for name, value in entry.items():
            assert torch.equal(saved["state"][index][name], value)


def test_hooks_see_tensors() -> None:
    """Catches the loading hooks of others being handed internal wrappers."""
    optimizer, _ = trained()
    seen = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: seen.extend(type(v) for e in state["state"].values() for v in e.values())
    )
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.extend(type(v) for e in o.state.values() for v in e.values())
    )
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(seen) == {torch.Tensor}


def test_loading_converts_to_the_saved_state_dtype() -> None:
    """Catches float64 moments (from a float64 run) kept beside float32 parameters."""
    optimizer, params = trained(torch.float64)
    copies = [torch.nn.Parameter(x.detach().float()) for x in params]
    resumed = ARSG(copies)
    resumed.load_state_dict(optimizer.state_dict())
    assert all(resumed.state[x]["exp_avg"].dtype == torch.float32 for x in copies)
    run(resumed, copies, gradients(SHAPES, 1, dtype=torch.float32))


@pytest.mark.parametrize("mode", MODES)
def test_state_dtype_may_change_at_a_reload(mode: str) -> None:
    """Catches bfloat16 moments without a step count: their random bits would be the same at every step."""
    optimizer, params = trained(preconditioner=mode)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["state_dtype"] = "bfloat16"
    resumed, resumed_params = loaded(saved, params)
    run(resumed, resumed_params, gradients(SHAPES, 3, dtype=torch.float32))
    state = resumed.state[resumed_params[0]]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["step"] == (8 if mode == "adam" else 3)


def test_state_dtype_changed_between_steps_is_refused_not_ignored() -> None:
    """Catches a setting that silently does nothing."""
    optimizer, params = trained()
    optimizer.param_groups[0]["state_dtype"] = "bfloat16"
    with pytest.raises(RuntimeError, match="state_dtype"):
        run(optimizer, params, gradients(SHAPES, 1, dtype=torch.float32))


def test_foreign_state_survives_loading() -> None:
    """Catches entries that others keep in the state cast to the dtype of the moments."""
    optimizer, params = trained()
    optimizer.state[params[0]]["mask"] = torch.tensor([True, False])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[params[0]]["mask"].dtype == torch.bool


def test_state_holds_nothing_that_is_not_needed() -> None:
    """Catches a step tensor per parameter where none is needed: launched, saved and sharded for nothing."""
    for settings, names in [
        ({}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        ({"preconditioner": "adam"}, {"exp_avg", "exp_avg_sq", "step"}),
        ({"preconditioner": "none"}, {"exp_avg"}),
        ({"preconditioner": "none", "state_dtype": "bfloat16"}, {"exp_avg", "step"}),
        ({"preconditioner": "none", "lookahead_k": 2}, {"exp_avg", "slow_param", "step"}),
    ]:
        optimizer, params = trained(**settings)
        assert set(optimizer.state[params[0]]) == names


def test_loading_brings_the_slow_parameters_to_the_dtype_of_the_arithmetic() -> None:
    """Catches slow parameters that stay in float64, beside moments that do not: twice the memory from then on."""
    optimizer, params = trained(torch.float64, lookahead_k=3)
    for dtype in (torch.float32, torch.bfloat16):
        copies = [torch.nn.Parameter(x.detach().to(dtype)) for x in params]
        resumed = ARSG(copies)
        resumed.load_state_dict(optimizer.state_dict())
        assert {resumed.state[x]["slow_param"].dtype for x in copies} == {torch.float32}
        run(resumed, copies, gradients(SHAPES, 3, dtype=dtype))


def test_every_group_of_a_loaded_state_is_brought_to_its_own_settings() -> None:
    """Catches only the first group's state converted, or converted as the first group's settings say."""
    params = parameters([(2,), (2,)], dtype=torch.float32)
    groups = [{"params": [x]} for x in params]
    optimizer = ARSG([groups[0], {**groups[1], "state_dtype": "bfloat16", "preconditioner": "adam"}])
    run(optimizer, params, gradients([(2,), (2,)], 3, dtype=torch.float32))
    saved = optimizer.state_dict()
    saved["state"][1]["step"] = torch.tensor(3.0)  # as engines restore it
    resumed = ARSG([{"params": [x]} for x in params])
    resumed.load_state_dict(saved)
    assert [resumed.state[x]["exp_avg"].dtype for x in params] == [torch.float32, torch.bfloat16]
    run(resumed, params, gradients([(2,), (2,)], 1, dtype=torch.float32))
    assert resumed.state[params[1]]["step"] == 4
