"""Settings: what is accepted, refused, and never silently ignored; conventions shared with torch.optim."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable

import pytest
import torch

from arsg_dist import ARSG
from tests.optim.optim_paths import MODES, PATHS, Path, assert_close, gradients, parameters, run

ONE = [(3,)]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"lr": float("inf")}, ValueError),
        ({"lr": torch.tensor([1.0, 2.0])}, ValueError),
        ({"lr": torch.tensor(1)}, TypeError),
        ({"lr": "fast"}, TypeError),
        ({"eps": -1e-8}, ValueError),
        ({"betas": (1.0, 0.99)}, ValueError),
        ({"betas": (0.9, -0.1)}, ValueError),
        ({"betas": 0.9}, TypeError),
        ({"betas": (torch.tensor(0.9), 0.99)}, TypeError),
        ({"weight_decay": -0.1}, ValueError),
        ({"mu": 1.0}, ValueError),
        ({"mu": -0.1}, ValueError),
        ({"mu": torch.tensor(1.5)}, ValueError),
        ({"preconditioner": "adagrad"}, ValueError),
        ({"state_dtype": "float16"}, ValueError),
        ({"lookahead_k": -1}, ValueError),
        ({"lookahead_k": 2.5}, TypeError),
        ({"lookahead_alpha": 1.5}, ValueError),
        ({"maximize": 1}, TypeError),
        ({"foreach": "yes"}, TypeError),
        ({"capturable": None}, TypeError),
        ({"foreach": True, "fused": True}, ValueError),
        ({"lr": torch.tensor(0.1), "foreach": True}, ValueError),
        ({"mu": torch.tensor(0.1), "foreach": True}, ValueError),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["constructor", "group", "add_param_group"])
def test_a_bad_setting_is_refused_wherever_it_is_given(settings, error, where) -> None:
    """Catches validation of the constructor's defaults only."""
    group = {"params": parameters(ONE), **settings}
    optimizer = ARSG(parameters(ONE))
    give = {
        "constructor": lambda: ARSG(**group),
        "group": lambda: ARSG([group]),
        "add_param_group": lambda: optimizer.add_param_group(group),
    }[where]
    with pytest.raises(error):
        give()
    assert len(optimizer.param_groups) == 1, "a refused group was added"


def test_settings_from_json_are_accepted() -> None:
    """Catches a constructor that needs Python's types: JSON has lists for betas, strings for dtypes, ints."""
    params = parameters(ONE, dtype=torch.float32)
    optimizer = ARSG(params, lr=1, betas=[0.9, 0], state_dtype="bfloat16", weight_decay=0, mu=0)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["state_dtype"]) == (1.0, (0.9, 0.0), "bfloat16")
    assert json.loads(json.dumps(group["state_dtype"])) == "bfloat16", "checkpoints refuse a torch.dtype"
    run(optimizer, params, gradients(ONE, 2, dtype=torch.float32))
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    assert ARSG(parameters(ONE), state_dtype=torch.bfloat16).param_groups[0]["state_dtype"] == "bfloat16"


def test_signature_follows_torch_adam() -> None:
    """Catches a renamed, reordered or positional option that torch's users write by name or position."""
    ours = inspect.signature(ARSG.__init__).parameters
    torchs = inspect.signature(torch.optim.Adam.__init__).parameters
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", "params", "lr", "betas", "eps", "weight_decay"]
    assert positional == list(torchs)[: len(positional)]
    shared = {"maximize", "foreach", "fused", "capturable"}
    if "decoupled_weight_decay" in torchs:  # not in torch 2.6, whose AdamW is the decoupled one
        shared.add("decoupled_weight_decay")
    for name in shared:
        assert ours[name].kind is torchs[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert ours[name].default == torchs[name].default
    # What torch has and we do not: amsgrad is our preconditioner, differentiable is not offered.
    assert set(torchs) - set(ours) == {"amsgrad", "differentiable"}
    step, torch_step = inspect.signature(ARSG.step), inspect.signature(torch.optim.Adam.step)
    assert list(step.parameters) == list(torch_step.parameters)
    assert step.parameters["closure"].default is None


def test_hyper_parameters_live_in_the_groups() -> None:
    """Catches settings kept on the optimizer: wrappers rebuild it from param_groups alone."""
    params = parameters([(3,), (2,)])
    optimizer = ARSG(
        [{"params": params[:1], "mu": 0.2}, {"params": params[1:], "preconditioner": "adam"}],
        lr=0.3,
        lookahead_k=2,
        betas=(0.9, 0.9),
    )
    rebuilt = ARSG(optimizer.param_groups)
    assert [{k: v for k, v in g.items() if k != "params"} for g in rebuilt.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ]
    names = set(inspect.signature(ARSG.__init__).parameters) - {"self"}
    assert names <= set(optimizer.param_groups[0])


@pytest.mark.parametrize("path", PATHS)
def test_groups_use_their_own_settings(path: Path) -> None:
    """Catches settings of one group leaking into another."""
    shapes = [(4,), (2, 3)]
    both, alone = parameters(shapes), parameters(shapes)
    settings = [
        {"lr": 0.1, "mu": 0.2, "eps": 1e-3},
        {"lr": 0.02, "preconditioner": "adam", "weight_decay": 0.1},
    ]
    grads = gradients(shapes, 8)
    together = ARSG([{"params": [x], **own} for x, own in zip(both, settings, strict=True)], **path.settings)
    run(together, both, grads)
    for i, own in enumerate(settings):
        run(ARSG([alone[i]], **own, **path.settings), [alone[i]], [[step[i]] for step in grads])
        assert torch.equal(both[i], alone[i])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_tensor_lr_and_mu_equal_floats(path: Path, mode: str) -> None:
    """Catches a tensor hyper-parameter ignored, or promoting the dtype."""
    params, others = parameters(ONE), parameters(ONE)
    settings = {"preconditioner": mode, "weight_decay": 0.1}
    tensors = {"lr": torch.tensor(0.125), "mu": torch.tensor([0.25])}
    fast = {**path.settings, "capturable": True} if path.settings.get("foreach") else path.settings
    run(ARSG(params, **tensors, **settings, **fast), params, gradients(ONE, 8))
    run(ARSG(others, lr=0.125, mu=0.25, **settings, **path.settings), others, gradients(ONE, 8))
    assert_close(params[0].detach(), others[0].detach(), 1e-6 if fast.get("capturable") else 1e-12)


def test_schedulers_and_direct_changes_take_effect_on_the_next_step() -> None:
    """Catches hyper-parameters cached at construction."""
    params = parameters(ONE)
    optimizer = ARSG(params, lr=1.0, betas=(0.0, 0.0), mu=0.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    moved = []
    for grads in gradients(ONE, 3):
        before = params[0].detach().clone()
        run(optimizer, params, [[grads[0].sign()]])
        moved.append((params[0].detach() - before).abs().max().item())
        scheduler.step()
    assert moved == pytest.approx([1.0, 0.1, 0.01])


def test_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    """Catches a closure run under no_grad."""
    x = torch.nn.Parameter(torch.ones(2))
    optimizer = ARSG([x], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(2.0)
    assert optimizer.step() is None
    assert (x < 1).all()


@pytest.mark.parametrize("path", PATHS)
def test_sparse_gradients_are_refused(path: Path) -> None:
    """Catches a sparse gradient densified, or failing deep inside a kernel."""
    x = torch.nn.Parameter(torch.ones(3))
    x.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        ARSG([x], **path.settings).step()


@pytest.mark.parametrize(
    "settings", [{}, {"lookahead_k": 2, "betas": (0.9, 0.99)}], ids=["plain", "lookahead"]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_complex_parameters_are_pairs_of_real_ones(path: Path, mode: str, settings) -> None:
    """Catches |g|² of a complex number used as the second moment; torch's Adam takes both parts apart."""
    params, others = parameters([(3, 2)]), parameters([(3, 2)])
    z = torch.nn.Parameter(torch.view_as_complex(params[0].detach().clone()))
    grads = gradients([(3, 2)], 6)
    settings = {"preconditioner": mode, "lr": 0.1, "weight_decay": 0.1, **settings}
    run(ARSG([z], **settings, **path.settings), [z], [[torch.view_as_complex(step[0])] for step in grads])
    run(ARSG(others, **settings, **path.settings), others, grads)
    assert_close(torch.view_as_real(z.detach()), others[0].detach(), 1e-13)


def test_bfloat16_state_of_complex_parameters_is_refused() -> None:
    """Catches an imaginary part dropped."""
    z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(ValueError, match="complex"):
        ARSG([z], state_dtype="bfloat16").step()


def test_lookahead_with_the_default_beta1_warns_once() -> None:
    """Catches the silent use of a combination that is not recommended."""
    with pytest.warns(UserWarning, match="lookahead"):
        optimizer = ARSG(parameters(ONE), lookahead_k=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": parameters(ONE)})
        ARSG(parameters(ONE), lookahead_k=5, betas=(0.9, 0.99))


def test_state_of_another_preconditioner_is_refused_clearly() -> None:
    """Catches a bare KeyError, or a silently restarted maximum."""
    params = parameters(ONE)
    optimizer = ARSG(params, preconditioner="adam")
    run(optimizer, params, gradients(ONE, 2))
    optimizer.param_groups[0]["preconditioner"] = "amsgrad"
    with pytest.raises(RuntimeError, match="max_exp_avg_sq"):
        optimizer.step()
    optimizer.restart()
    optimizer.step()


def test_the_ends_of_the_domains_are_in_them() -> None:
    """Catches a setting refused at the end of its domain: a = 1 pulls all the way, 0 switches off."""
    params = parameters(ONE)
    optimizer = ARSG(
        params,
        lr=0.0,
        betas=(0.0, 0.0),
        eps=0.0,
        mu=0.0,
        weight_decay=0.0,
        lookahead_k=1,
        lookahead_alpha=1.0,
    )
    before = params[0].detach().clone()
    run(optimizer, params, gradients(ONE, 2))
    assert torch.equal(params[0], before)
    ARSG(parameters(ONE), lookahead_k=1, lookahead_alpha=0.0, betas=(0.9, 0.99))


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_a_scheduler_that_cycles_beta1_is_refused(make: Callable[[ARSG], object]) -> None:
    """Catches β1 = 0.999 that falls to 0.85 without a word, and a refusal of one that cycles lr only."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = ARSG([param], lr=0.01)
    make(optimizer)
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3))
    torch.optim.lr_scheduler.OneCycleLR(
        alone := ARSG([param], lr=0.01), max_lr=0.1, total_steps=10, cycle_momentum=False
    )
    alone.step()
    assert not torch.equal(param, torch.ones(3))


def test_a_beta1_of_1_edited_into_a_group_is_refused() -> None:
    """Catches a division by zero from inside the observation distance."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = ARSG([param], lr=0.01)
    optimizer.param_groups[0]["betas"] = (1.0, 0.99)
    with pytest.raises(ValueError, match=r"Invalid betas\[0\]: 1.0"):
        optimizer.step()
