"""ARSG.from_adam and ARSG.from_qhm."""

from __future__ import annotations

import warnings

import pytest
import qhoptim.pyt
import torch
from pytorch_optimizer import AdEMAMix, SimplifiedAdEMAMix

from arsg_dist import ARSG
from tests.optim.optim_paths import assert_close, gradients, parameters, run

SHAPES = [(5,), (2, 3)]


def continued(make_source, make_ours, relative: float, steps_before: int = 20) -> None:
    """Train with the source, convert, and train copies with both: the ways must agree to `relative`."""
    params = parameters(SHAPES)
    source = make_source(params)
    grads = gradients(SHAPES, steps_before + 20)
    run(source, params, grads[:steps_before])
    start = [x.detach().clone() for x in params]
    ours = make_ours(source)
    run(ours, params, grads[steps_before:])
    arrived = [x.detach().clone() for x in params]
    with torch.no_grad():
        for x, x0 in zip(params, start, strict=True):
            x.copy_(x0)
    run(source, params, grads[steps_before:])
    for x, y, x0 in zip(params, arrived, start, strict=True):
        assert_close(y - x0, x.detach() - x0, relative)


@pytest.mark.parametrize("source", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_with_mu_zero_goes_on_exactly(source) -> None:
    """Catches a lost step count, moment, weight decay kind or ε."""
    continued(
        lambda params: source(
            [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "weight_decay": 0.3}], eps=0.1
        ),
        lambda adam: ARSG.from_adam(adam, mu=0.0),
        1e-12,
    )


def test_amsgrad_with_mu_zero_goes_on_nearly() -> None:
    """Catches moments transferred uncorrected: after 60 steps the way is off by 40 %, corrected by 3 %.

    Not exact: the correction is applied once instead of at every step, and ε is a floor instead of a summand.
    """
    continued(
        lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True, betas=(0.9, 0.99)),
        lambda adam: ARSG.from_adam(adam, mu=0.0),
        0.05,
        steps_before=60,
    )


def test_nadam_goes_on_once_its_schedule_has_faded() -> None:
    """Catches μ ≠ 1 − β1: NAdam's limit is Nesterov's point."""
    continued(
        lambda params: torch.optim.NAdam(params, lr=0.1, momentum_decay=10.0),
        ARSG.from_adam,
        1e-6,
        steps_before=300,
    )


def test_settings_of_adam_are_mapped() -> None:
    """Catches a setting dropped on the way."""
    params = parameters([(2,), (2,)])
    adam = torch.optim.AdamW(
        [{"params": [("a", params[0])], "lr": 0.3, "amsgrad": True}, {"params": [("b", params[1])]}],
        eps=1e-4,
        betas=(0.8, 0.9),
        weight_decay=0.2,
        maximize=True,
        foreach=True,
    )
    torch.optim.lr_scheduler.ConstantLR(adam, factor=0.5)
    first, second = ARSG.from_adam(adam).param_groups
    assert (first["preconditioner"], second["preconditioner"]) == ("amsgrad", "adam")
    assert first["eps"] == pytest.approx(1e-8)
    assert second["eps"] == 1e-4
    assert (first["lr"], first["initial_lr"], first["param_names"]) == (0.15, 0.3, ["a"])
    assert second["betas"] == (0.8, 0.9)
    assert second["mu"] == 0.1
    assert second["decoupled_weight_decay"] is second["maximize"] is second["foreach"] is True
    assert second["weight_decay"] == 0.2
    overridden = ARSG.from_adam(adam, preconditioner="amsgrad", eps=1e-3, mu=0.2).param_groups[1]
    assert (overridden["preconditioner"], overridden["eps"], overridden["mu"]) == ("amsgrad", 1e-3, 0.2)


@pytest.mark.parametrize(("source", "decoupled"), [(torch.optim.Adam, False), (torch.optim.AdamW, True)])
def test_adamw_is_decoupled_where_its_groups_do_not_say_so(
    source: type[torch.optim.Adam], decoupled: bool
) -> None:
    """Catches the decay of an AdamW of torch 2.6 that becomes part of the gradient."""
    adam = source(parameters([(2,)]), weight_decay=0.2)
    adam.param_groups[0].pop("decoupled_weight_decay", None)
    assert ARSG.from_adam(adam).param_groups[0]["decoupled_weight_decay"] is decoupled


@pytest.mark.parametrize("preconditioner", ["amsgrad", "adam", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_of_adam_fits_every_preconditioner(preconditioner: str, dtype: torch.dtype) -> None:
    """Catches missing keys, a wrong dtype, or tensors shared with the source."""
    params = parameters(SHAPES, dtype=dtype)
    adam = torch.optim.Adam(params)
    run(adam, params, gradients(SHAPES, 3, dtype=dtype))
    before = [adam.state[x]["exp_avg"].clone() for x in params]
    ours = ARSG.from_adam(adam, preconditioner=preconditioner, lookahead_k=3, betas=(0.9, 0.99))
    assert all(ours.state[x]["step"] == 3 and type(ours.state[x]["step"]) is int for x in params)
    assert all(ours.state[x]["exp_avg"].dtype == torch.float32 for x in params)
    run(ours, params, gradients(SHAPES, 3, dtype=dtype))
    assert all(torch.equal(adam.state[x]["exp_avg"], m) for x, m in zip(params, before, strict=True))


def test_without_keep_state_training_starts_afresh() -> None:
    """Catches keep_state ignored."""
    params = parameters(SHAPES)
    adam = torch.optim.Adam(params)
    run(adam, params, gradients(SHAPES, 3))
    assert len(ARSG.from_adam(adam, keep_state=False).state) == 0
    assert len(ARSG.from_adam(adam).state) == 2


def test_other_optimizers_are_refused() -> None:
    """Catches a mapping guessed from equal names."""
    params = parameters(SHAPES)
    with pytest.raises(TypeError, match="SGD"):
        ARSG.from_adam(torch.optim.SGD(params))
    with pytest.raises(TypeError, match="QHM"):
        ARSG.from_qhm(torch.optim.SGD(params))
    with pytest.raises(ValueError, match="differentiable"):
        ARSG.from_adam(torch.optim.Adam(params, differentiable=True))
    with pytest.raises(ValueError, match="SGD"):
        ARSG.from_qhm(qhoptim.pyt.QHM(params, lr=1.0, momentum=0.9, nu=0.0))
    qhm = qhoptim.pyt.QHM(params, lr=1.0, momentum=0.9, nu=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(qhm, params, gradients(SHAPES, 1))
    with pytest.raises(ValueError, match="keep_state"):
        ARSG.from_qhm(qhm, preconditioner="amsgrad")
    fresh = ARSG.from_qhm(qhm, preconditioner="amsgrad", keep_state=False)
    assert fresh.param_groups[0]["mu"] == pytest.approx(0.3)


@pytest.mark.filterwarnings("ignore:.*overload of add.*is deprecated")
@pytest.mark.parametrize("weight_decay_type", ["grad", "direct"])
def test_qhm_goes_on_exactly(weight_decay_type: str) -> None:
    """Catches ν taken for μ, or a momentum buffer scaled by 1 − β."""
    continued(
        lambda params: qhoptim.pyt.QHM(
            params, lr=0.5, momentum=0.95, nu=0.7, weight_decay=0.1, weight_decay_type=weight_decay_type
        ),
        ARSG.from_qhm,
        1e-12,
    )


@pytest.mark.parametrize("preconditioner", ["amsgrad", "none"])
def test_young_moments_are_transferred_corrected(preconditioner: str) -> None:
    """Catches moments that stay as small as Adam keeps them after a few steps, where nothing corrects them any more."""
    x = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([x], betas=(0.9, 0.99))
    run(adam, [x], [[torch.full((1,), 2.0)]] * 3)
    state = ARSG.from_adam(adam, preconditioner=preconditioner).state[x]
    assert state["exp_avg"].item() == pytest.approx(2.0)  # of three equal gradients
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        assert name not in state or state[name].item() == pytest.approx(4.0)
    assert ("max_exp_avg_sq" in state) == (preconditioner == "amsgrad")


def test_a_learning_rate_in_a_tensor_is_not_shared_with_the_source() -> None:
    """Catches a boost of the converted optimizer that changes the source, which is to be left as it is."""
    params = parameters([(2,)])
    adam = torch.optim.Adam(params, lr=torch.tensor(0.5), capturable=False)
    ours = ARSG.from_adam(adam)
    ours.param_groups[0]["lr"].fill_(9.0)
    assert adam.param_groups[0]["lr"].item() == 0.5


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw_goes_on_as_it_was(amsgrad: bool) -> None:
    """Catches a conversion that starts to look ahead, where somebody asked for the same method."""
    continued(
        lambda params: torch.optim.AdamW(
            params, lr=0.1, weight_decay=0.0 if amsgrad else 0.3, amsgrad=amsgrad, betas=(0.9, 0.99)
        ),
        ARSG.from_adamw,
        0.05 if amsgrad else 1e-12,
        steps_before=60 if amsgrad else 20,
    )
    params = parameters(SHAPES)
    assert ARSG.from_adamw(torch.optim.Adam(params), mu=0.2).param_groups[0]["mu"] == 0.2
    with pytest.raises(TypeError, match="from_adam"):
        ARSG.from_adamw(torch.optim.NAdam(params))


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "maximize": True},
        {"momentum": 0.8, "dampening": 0.5},
        {"momentum": 0.0, "dampening": 0.5},
    ],
    ids=str,
)
def test_sgd_goes_on_exactly(settings) -> None:
    """Catches a sum taken for an average, dampening lost, and a learning rate that is not the average's."""
    continued(
        lambda params: torch.optim.SGD(params, lr=0.05, weight_decay=0.1, **settings), ARSG.from_sgd, 1e-12
    )


def test_learning_rates_that_schedulers_keep_are_converted_along() -> None:
    """Catches a decay that goes on from SGD's base, at a tenth of what it should be."""
    params = parameters(SHAPES)
    sgd = torch.optim.SGD(params, lr=0.4, momentum=0.9)
    torch.optim.lr_scheduler.ConstantLR(sgd, factor=0.5)
    group = ARSG.from_sgd(sgd).param_groups[0]
    assert (group["lr"], group["initial_lr"]) == (pytest.approx(2.0), pytest.approx(4.0))


@pytest.mark.filterwarnings("ignore:.*overload of add.*is deprecated")
@pytest.mark.parametrize("steps_before", [3, 500])
def test_qhadam_goes_on_exactly(steps_before: int) -> None:
    """Catches moments that QHAdam keeps corrected taken for uncorrected ones, of a young and of an old state."""
    continued(
        lambda params: qhoptim.pyt.QHAdam(
            params, lr=0.05, betas=(0.9, 0.95), nus=(0.7, 1.0), eps=1e-3, weight_decay=0.1,
            decouple_weight_decay=True,
        ),
        ARSG.from_qhadam,
        1e-12,
        steps_before=steps_before,
    )  # fmt: skip


def test_simplified_ademamix_goes_on() -> None:
    """Catches lr, λ or μ of the other convention of its momentum; its own correction of v has faded after 800 steps."""
    continued(
        lambda params: SimplifiedAdEMAMix(
            params, lr=0.01, betas=(0.99, 0.95), alpha=2.0, eps=1e-3, weight_decay=0.1, foreach=False
        ),
        ARSG.from_ademamix,
        1e-12,
        steps_before=800,
    )


class SimAdEMAMix(torch.optim.Optimizer):
    """The paper's rule with m as a sum, as its authors publish it, in as many lines."""

    def __init__(self, params, **settings) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for x in group["params"]:
                state = self.state[x]
                t = state["step"] = state.get("step", 0) + 1
                m = state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + x.grad
                v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * x.grad**2
                update = (m + group["alpha"] * x.grad) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
                x -= group["lr"] * (update + group["weight_decay"] * x)


def test_the_authors_ademamix_goes_on_from_its_first_steps() -> None:
    """Catches a sum that is copied as an average, and a step count that is lost."""
    continued(
        lambda params: SimAdEMAMix(
            params, lr=1e-3, betas=(0.99, 0.95), alpha=50.0, eps=1e-3, weight_decay=0.1
        ),
        ARSG.from_ademamix,
        1e-12,
        steps_before=3,
    )


def test_what_does_not_convert_is_refused_by_name() -> None:
    """Catches a method that is nearly, but not, the user's."""
    params = parameters(SHAPES)
    with pytest.raises(TypeError, match="two averages"):
        ARSG.from_ademamix(AdEMAMix(params))
    with pytest.raises(ValueError, match="momentum='sum'"):
        ARSG.from_ademamix(torch.optim.Adam(params))
    with pytest.raises(TypeError, match="alpha"):
        ARSG.from_ademamix(torch.optim.Adam(params), momentum="sum")
    with pytest.raises(ValueError, match="not over"):
        ARSG.from_ademamix(SimplifiedAdEMAMix(params, beta1_warmup=10))
    with pytest.raises(ValueError, match=r"nus\[1\]"):
        ARSG.from_qhadam(qhoptim.pyt.QHAdam(params, nus=(0.7, 0.9)))
    with pytest.raises(TypeError, match="QHAdam"):
        ARSG.from_qhadam(torch.optim.Adam(params))
    with pytest.raises(TypeError, match="SGD"):
        ARSG.from_sgd(torch.optim.Adam(params))
    adam = torch.optim.Adam(params)
    run(adam, params, gradients(SHAPES, 1))
    with pytest.raises(ValueError, match="keep_state=False"):
        ARSG.from_adam(adam, precondition_first=True)


@pytest.mark.parametrize("correction", ["both", "second", "none"])
def test_moments_are_transferred_as_the_target_corrects_them(correction: str) -> None:
    """Catches a moment corrected twice, or not at all, under each bias correction."""
    x = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.Adam([x], betas=(0.9, 0.99))
    run(adam, [x], [[torch.full((1,), 2.0)]] * 3)
    state = ARSG.from_adam(adam, bias_correction=correction).state[x]
    m, v = 2 * (1 - 0.9**3), 4 * (1 - 0.99**3)
    assert state["exp_avg"].item() == pytest.approx(m if correction == "both" else 2.0)
    assert state["exp_avg_sq"].item() == pytest.approx(v if correction != "none" else 4.0)
