"""Independent optimizers and derivations that ARSG must agree with."""

from __future__ import annotations

import warnings

import pytest
import qhoptim.pyt
import torch

from arsg_dist import ARSG
from tests.optim.optim_paths import ALL_PATHS, MODES, PATHS, Path, assert_close, gradients, parameters, run

SHAPES = [(7,), (3, 4), ()]
STEPS = 50


@pytest.fixture(autouse=True)
def _silence_qhoptim():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*overload of add.*is deprecated")
        warnings.filterwarnings("ignore", message=".*overload of addcdiv.*is deprecated")
        yield


def compare(
    ours: torch.optim.Optimizer, params, other: torch.optim.Optimizer, others, grads, relative
) -> None:
    for step_grads in grads:
        run(ours, params, [step_grads])
        run(other, others, [step_grads])
        for ours_x, other_x in zip(params, others, strict=True):
            assert_close(ours_x.detach(), other_x.detach(), relative)


@pytest.mark.parametrize("weight_decay_type", ["grad", "direct"])
@pytest.mark.parametrize("path", PATHS)
def test_rsg_is_qhm_with_nu_one_minus_mu(path: Path, weight_decay_type: str) -> None:
    """Catches a wrong numerator, and coupled and decoupled decay confused."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    ours = ARSG(
        params, lr=0.5, betas=(0.95, 0.99), mu=0.3, weight_decay=0.02,
        decoupled_weight_decay=weight_decay_type == "direct", preconditioner="none", **path.settings,
    )  # fmt: skip
    qhm = qhoptim.pyt.QHM(
        others, lr=0.5, momentum=0.95, nu=0.7, weight_decay=0.02, weight_decay_type=weight_decay_type
    )
    compare(ours, params, qhm, others, gradients(SHAPES, STEPS), 1e-12)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_adam_mode_is_qhadam_from_the_first_step(path: Path, decoupled: bool) -> None:
    """Catches a wrong or missing bias correction, also of the μ·g term, which must not be corrected.

    QHAdam averages with weights 1 − 1/Σβᵏ, which keeps exactly m/(1−β1ᵗ) and v/(1−β2ᵗ). With ν1 = 1−μ, ν2 = 1
    its step is ((1−μ)·m/(1−β1ᵗ) + μ·g)/(√(v/(1−β2ᵗ)) + ε): ours, not only once the corrections have faded.
    """
    params, others = parameters(SHAPES), parameters(SHAPES)
    settings = {"lr": 0.02, "betas": (0.95, 0.98), "eps": 1e-3, "weight_decay": 0.02}
    ours = ARSG(
        params,
        mu=0.2,
        preconditioner="adam",
        decoupled_weight_decay=decoupled,
        **settings,
        **path.settings,
    )
    qhadam = qhoptim.pyt.QHAdam(others, nus=(0.8, 1.0), decouple_weight_decay=decoupled, **settings)
    compare(ours, params, qhadam, others, gradients(SHAPES, STEPS), 1e-12)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_mu_zero_is_torch_amsgrad_started_late(path: Path, decoupled: bool) -> None:
    """Catches a wrong maximum or floor.

    torch's AMSGrad divides m by 1−β1ᵗ, √max v by √(1−β2ᵗ) and adds ε to the root. With the step count started
    at 10⁶ both corrections are 1 in float64, and with its ε = 0 and its maximum started at our ε its
    denominator is √v̂: the two rules are then the same, term by term.
    """
    eps = 0.8  # of the size of the second moments, so that the floor matters for some elements only
    params, others = parameters(SHAPES), parameters(SHAPES)
    settings = {"lr": 0.02, "betas": (0.95, 0.98), "weight_decay": 0.02}
    ours = ARSG(params, mu=0.0, eps=eps, decoupled_weight_decay=decoupled, **settings, **path.settings)
    adam = (torch.optim.AdamW if decoupled else torch.optim.Adam)(others, eps=0.0, amsgrad=True, **settings)
    for x in others:
        adam.state[x] = {
            "step": torch.tensor(1e6),
            "exp_avg": torch.zeros_like(x),
            "exp_avg_sq": torch.zeros_like(x),
            "max_exp_avg_sq": torch.full_like(x, eps),
        }
    compare(ours, params, adam, others, gradients(SHAPES, STEPS), 1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_mu_zero_adam_mode_is_torch_adam(path: Path) -> None:
    """Catches ε inside the root in Adam mode."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    ours = ARSG(params, lr=0.02, betas=(0.9, 0.99), eps=0.1, mu=0.0, preconditioner="adam", **path.settings)
    adam = torch.optim.Adam(others, lr=0.02, betas=(0.9, 0.99), eps=0.1)
    compare(ours, params, adam, others, gradients(SHAPES, STEPS), 1e-12)


def test_nesterov_point_is_torch_nesterov_sgd() -> None:
    """Catches a wrong μ: μ = 1−β1 must be Nesterov's point.

    torch's Nesterov SGD keeps b = Σβᵏg and moves by lr·(g + βb). With m = (1−β)b, lr = α(1−β) this is
    α·((1−β)g + βm), ours with μ = 1−β.
    """
    params, others = parameters(SHAPES), parameters(SHAPES)
    ours = ARSG(params, lr=0.5, betas=(0.9, 0.99), mu=0.1, preconditioner="none")
    sgd = torch.optim.SGD(others, lr=0.05, momentum=0.9, nesterov=True)
    compare(ours, params, sgd, others, gradients(SHAPES, STEPS), 1e-12)


@pytest.mark.parametrize("mode", ["amsgrad", "none"])
def test_one_point_form_is_the_two_point_form(mode: str) -> None:
    """Catches a wrong observation distance η, in the update or in base_iterate().

    Two points: θ ← θ − α·m/√v̂, x ← θ − α·η·m/√v̂ with the gradient at x. Exact for a constant denominator,
    which a floor ε above every squared gradient gives "amsgrad".
    """
    alpha, beta1, mu, eps = 0.05, 0.9, 0.3, 100.0
    eta = mu * beta1 / (1 - beta1)
    root = eps**0.5 if mode == "amsgrad" else 1.0
    generator = torch.Generator().manual_seed(3)
    curvature = torch.rand(6, generator=generator, dtype=torch.float64)
    x = torch.nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))
    theta, remote, m = x.detach().clone(), x.detach().clone(), torch.zeros(6, dtype=torch.float64)
    optimizer = ARSG([x], lr=alpha, betas=(beta1, 0.99), eps=eps, mu=mu, preconditioner=mode)
    for _ in range(40):
        x.grad = curvature * x.detach()
        optimizer.step()
        m = beta1 * m + (1 - beta1) * curvature * remote
        theta = theta - alpha * m / root
        remote = theta - alpha * eta * m / root
        assert_close(x.detach(), remote, 1e-12, "x")
        with optimizer.base_iterate():
            assert_close(x.detach(), theta, 1e-12, "theta")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_maximize_is_minimizing_the_negative(path: Path, mode: str) -> None:
    """Catches the sign applied after weight decay, or to a part of the numerator only."""
    params, others = parameters(SHAPES), parameters(SHAPES)
    settings = {"lr": 0.1, "weight_decay": 0.05, "preconditioner": mode}
    ours = ARSG(params, maximize=True, **settings, **path.settings)
    other = ARSG(others, foreach=False, **settings)
    for step_grads in gradients(SHAPES, 10):
        run(ours, params, [step_grads])
        run(other, others, [[-grad for grad in step_grads]])
    for x, y in zip(params, others, strict=True):
        # Capturable paths count steps in float32.
        assert_close(x.detach(), y.detach(), 1e-6 if path.settings.get("capturable") else 1e-12)
