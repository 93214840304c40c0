"""RemoteObservation around any optimizer against ARSG, QHM and the published recurrences."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_optimizer import Lion
from qhoptim.pyt import QHM
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from arsg_dist import ARSG, RemoteObservation

Gradient = Callable[[int, Tensor], Tensor]
STEPS = 300


def gradients(seed: int = 0) -> Gradient:
    """Noisy gradients of a quadratic, the same numbers at the same step for whoever asks."""
    curvature = torch.logspace(-2, 1, 24, dtype=torch.float64)
    noise = torch.randn(STEPS + 50, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda step, x: curvature.view(x.shape) * x + noise[step].view(x.shape)


def start(shape: tuple[int, ...] = (24,)) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 2, 24, dtype=torch.float64).view(shape))


def run(
    optimizer: Optimizer, x: Tensor, gradient: Gradient, steps: int = STEPS, first: int = 0
) -> list[Tensor]:
    """Parameters after every step."""
    path = []
    for step in range(first, first + steps):
        x.grad = gradient(step, x.detach())
        optimizer.step()
        path.append(x.detach().clone())
    return path


def assert_same_path(one: list[Tensor], other: list[Tensor], relative: float = 1e-12) -> None:
    scale = torch.stack(other).abs().max()
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        assert (a - b).abs().max() <= relative * scale, f"step {step}: {(a - b).abs().max() / scale:.3g}"


MU_BETA1 = [(0.1, 0.999), (0.3, 0.9), (0.05, 0.99)]


@pytest.mark.parametrize(("mu", "beta1"), MU_BETA1)
def test_around_sgd_it_is_rsg(mu: float, beta1: float) -> None:
    """Catches a factor of the average, of the observation's distance, or of the learning rate that is off."""
    lr, x, y = 0.05, start(), start()
    remote = RemoteObservation(SGD([x], lr=lr * mu), mu=mu, beta1=beta1)
    rsg = ARSG([y], lr=lr, betas=(beta1, 0.9), mu=mu, preconditioner="none")
    assert_same_path(run(remote, x, gradients()), run(rsg, y, gradients()))
    # ARSG's base iterate lies further back, where movement is an average alone.
    distance = mu * beta1 / (1 - beta1)
    with rsg.base_iterate():
        assert_same_path([x.detach() - distance * remote.state[x]["movement"]], [y.detach()])


@pytest.mark.parametrize(("mu", "beta1"), MU_BETA1)
def test_around_sgd_it_is_qhm(mu: float, beta1: float) -> None:
    """Catches an ARSG that is wrong in the same way."""
    lr, x, y = 0.05, start(), start()
    remote = RemoteObservation(SGD([x], lr=lr * mu), mu=mu, beta1=beta1)
    assert_same_path(
        run(remote, x, gradients()), run(QHM([y], lr=lr, nu=1 - mu, momentum=beta1), y, gradients())
    )


def muon(params: list[Tensor]) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip(f"torch {torch.__version__} has no Muon")
    return torch.optim.Muon(params, lr=0.02, momentum=0.5, weight_decay=0.01)


INNER: dict[str, tuple[Callable[[list[Tensor]], Optimizer], tuple[int, ...]]] = {
    "SGD with momentum": (lambda p: SGD(p, lr=0.01, momentum=0.5, weight_decay=0.01), (24,)),
    "AdamW": (lambda p: AdamW(p, lr=0.003, betas=(0.0, 0.9), weight_decay=0.1), (24,)),
    "Lion": (lambda p: Lion(p, lr=0.001, betas=(0.9, 0.99)), (24,)),
    "Muon": (muon, (4, 6)),
    "ARSG": (lambda p: ARSG(p, lr=0.003, betas=(0.0, 0.9), mu=0.0, preconditioner="adam"), (24,)),
    "RMSprop": (lambda p: RMSprop(p, lr=0.003), (24,)),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize(("mu", "beta1"), MU_BETA1)
def test_it_is_ema_nesterov(name: str, mu: float, beta1: float) -> None:
    """Catches a base iterate, a decay or an order of the two movements that differs from the published recurrence:
    θ' = A(θ + βm), m' = γm + (1−γ)(θ' − θ), with β = 1−μ and β1 = γ + (1−γ)β."""
    make, shape = INNER[name]
    gradient = gradients()
    x, theta = start(shape), start(shape).detach().clone()
    remote = RemoteObservation(make([x]), mu=mu, beta1=beta1)
    ours = run(remote, x, gradient)

    beta = 1 - mu
    gamma = (beta1 - beta) / (1 - beta)
    point = nn.Parameter(theta.clone())
    inner, m = make([point]), torch.zeros_like(theta)
    theirs = []
    for step in range(STEPS):
        with torch.no_grad():
            point.copy_(theta + beta * m)
        point.grad = gradient(step, point.detach())
        inner.step()
        m, theta = gamma * m + (1 - gamma) * (point.detach() - theta), point.detach().clone()
        theirs.append(theta + beta * m)
    bits = 1e-12 if name != "Lion" else 1e-9  # a sign that differs by a rounding is a whole step
    assert_same_path(ours, theirs, 1e-4 if name == "Muon" else bits)  # Muon computes in bfloat16
    with remote.base_iterate():
        assert_same_path([x.detach()], [theta], 1e-4 if name == "Muon" else bits)


@pytest.mark.parametrize("name", INNER)
def test_mu_1_is_the_inner_optimizer_bit_for_bit(name: str) -> None:
    """Catches a rounding that everybody pays who switches remote observation off."""
    make, shape = INNER[name]
    x, y = start(shape), start(shape)
    inner = make([y])
    assert_same_path(
        run(RemoteObservation(make([x]), mu=1.0, beta1=0.9), x, gradients(), 20),
        run(inner, y, gradients(), 20),
        0.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_dtypes_scalars_and_empty_tensors(dtype: torch.dtype) -> None:
    """Catches a movement in half precision, a shape that foreach changes, and a complex number treated as real."""
    params = [
        nn.Parameter(torch.ones((), dtype=dtype)),
        nn.Parameter(torch.ones(0, 3, dtype=dtype)),
        nn.Parameter(torch.ones(3, 2, dtype=dtype)),
    ]
    optimizer = RemoteObservation(SGD(params, lr=0.25), mu=0.5, beta1=0.5)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    # Δ = −0.25, d = (1 − 0.5) / 0.5 · Δ = −0.25, x = 1 − 0.25 − 0.5 · 0.25
    for param in params:
        assert param.dtype == dtype
        assert torch.equal(param, torch.full_like(param, 0.625))
        held = optimizer.state[param]["movement"]
        assert held.dtype == (dtype if dtype.is_complex else torch.float32)
        assert torch.equal(held, torch.full_like(held, -0.25))


def test_the_memory_is_one_buffer_per_parameter() -> None:
    """Catches a second copy of the parameters that stays."""
    params = [nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(2, 5))]
    optimizer = RemoteObservation(SGD(params, lr=0.1))
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if value is not None]
    assert sum(value.numel() for value in held) == sum(param.numel() for param in params)
    kept = [value for value in vars(optimizer).values() if isinstance(value, Tensor)]
    assert not kept


def test_groups_have_settings_of_their_own() -> None:
    """Catches the first group's μ for all, and a parameter without a gradient that is moved."""
    xs, ys = [start(), start(), start()], [start(), start()]
    settings = [(0.1, 0.99), (0.4, 0.7)]
    groups: list[dict[str, Any]] = [
        {"params": [x], "remote_mu": mu, "remote_beta1": beta1}
        for x, (mu, beta1) in zip(xs[:2], settings, strict=True)
    ]
    optimizer = RemoteObservation(SGD(groups, lr=0.01), mu=1.0)
    optimizer.add_param_group({"params": [xs[2]], "lr": 0.02, "remote_beta1": 0.5})
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert [group["remote_mu"] for group in optimizer.param_groups] == [0.1, 0.4, 1.0]
    gradient = gradients()
    for step in range(20):
        for x in xs[:2]:
            x.grad = gradient(step, x.detach())
        optimizer.step()
    for x, y, (mu, beta1) in zip(xs, ys, settings, strict=False):
        run(RemoteObservation(SGD([y], lr=0.01), mu=mu, beta1=beta1), y, gradient, 20)
        assert torch.equal(x, y)
    assert torch.equal(xs[2], start())


@pytest.mark.parametrize("way", ["state_dict", "torch.save", "pickle", "deepcopy"])
@pytest.mark.parametrize("name", ["AdamW", "ARSG", "SGD with momentum"])
def test_a_copy_goes_on_with_the_same_bits(way: str, name: str) -> None:
    """Catches a movement or a moment that is lost or cast, and an inner optimizer left with the old parameters."""
    make, _ = INNER[name]
    x = start()
    optimizer = RemoteObservation(make([x]), mu=0.2, beta1=0.9)
    run(optimizer, x, gradients(), 10)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(optimizer))
    elif way == "deepcopy":
        again = copy.deepcopy(optimizer)
    else:
        y = nn.Parameter(x.detach().clone())
        again = RemoteObservation(make([y]), mu=0.5, beta1=0.8)
        state = optimizer.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        again.load_state_dict(copy.deepcopy(state))
        assert again.param_groups[0]["remote_mu"] == 0.2
    (y,) = again.param_groups[0]["params"]
    assert again.optimizer.param_groups is again.param_groups
    assert again.optimizer.state is again.state
    assert_same_path(
        run(again, y, gradients(), 10, first=10), run(optimizer, x, gradients(), 10, first=10), 0.0
    )


def test_half_precision_parameters_load_their_movement_in_float32() -> None:
    """Catches torch's cast of loaded state to the parameter's dtype."""
    x = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    optimizer = RemoteObservation(SGD([x], lr=1.0), mu=0.3, beta1=0.9)
    x.grad = torch.full_like(x, 0.1)
    optimizer.step()
    saved = optimizer.state_dict()
    held = saved["state"][0]["movement"].clone()
    assert not torch.equal(held, held.bfloat16().float())
    again = RemoteObservation(SGD([x], lr=0.01), mu=0.3, beta1=0.9)
    again.load_state_dict(saved)
    assert again.state[x]["movement"].dtype == torch.float32
    assert torch.equal(again.state[x]["movement"], held)


def test_a_state_of_the_inner_optimizer_alone_is_taken() -> None:
    """Catches people who wrap an optimizer in the middle of a training losing its moments, or their settings."""
    x, y = start(), start()
    alone = AdamW([x], lr=0.01)
    run(alone, x, gradients(), 5)
    wrapped = RemoteObservation(AdamW([y], lr=0.02), mu=0.2, beta1=0.9)
    wrapped.load_state_dict(alone.state_dict())
    assert torch.equal(wrapped.state[y]["exp_avg"], alone.state[x]["exp_avg"])
    group = wrapped.param_groups[0]
    assert (group["lr"], group["remote_mu"], group["remote_beta1"]) == (0.01, 0.2, 0.9)


def test_schedulers_act_on_the_inner_learning_rate() -> None:
    """Catches a scheduler that changes groups nobody reads."""
    x, y = start(), start()
    optimizer = RemoteObservation(SGD([x], lr=0.1), mu=0.2, beta1=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    rates = [0.1, 0.05, 0.025]
    gradient = gradients()
    for step in range(3):
        run(optimizer, x, gradient, 1, first=step)
        scheduler.step()
    by_hand = RemoteObservation(SGD([y], lr=0.1), mu=0.2, beta1=0.9)
    for step, rate in enumerate(rates):
        by_hand.param_groups[0]["lr"] = rate
        run(by_hand, y, gradient, 1, first=step)
    assert torch.equal(x, y)


def test_closures_hooks_and_grad_scaler() -> None:
    """Catches a closure that is called twice, hooks that do not fire, and an overflow that moves the parameters."""
    x = nn.Parameter(torch.ones(3))
    optimizer = RemoteObservation(SGD([x], lr=0.1), mu=0.5, beta1=0.5)
    fired, called = [], []
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))

    def closure() -> Tensor:
        called.append(True)
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 3.0  # type: ignore[arg-type]
    assert (called, fired) == ([True], ["pre", "post"])
    scaler = torch.amp.GradScaler("cpu")
    before = x.detach().clone(), optimizer.state[x]["movement"].clone()
    scaler.scale(x.sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(x, before[0])
    assert torch.equal(optimizer.state[x]["movement"], before[1])


def test_base_iterate_gives_x_back_bit_for_bit_and_refuses_steps() -> None:
    """Catches an evaluation that changes the training, and a gradient taken at θ."""
    x = start()
    optimizer = RemoteObservation(SGD([x], lr=0.1), mu=0.2, beta1=0.9)
    run(optimizer, x, gradients(), 5)
    before = x.detach().clone()
    with optimizer.base_iterate():
        expected = before - (1 - 0.2) * optimizer.state[x]["movement"]
        assert torch.allclose(x, expected, rtol=1e-14, atol=0)
        for forbidden in (
            optimizer.step,
            lambda: optimizer.load_state_dict({}),
            lambda: optimizer.add_param_group({"params": []}),
            lambda: optimizer.base_iterate().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="inside base_iterate"):
                forbidden()
    assert torch.equal(x, before)


class Exchanging(SGD):
    """As Horovod's wrappers are told apart."""

    def skip_synchronize(self) -> None:
        """Of its own."""


class ReplacesData(SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                param.data = param.data - group["lr"] * param.grad


def test_what_it_cannot_go_around_is_refused_by_name() -> None:
    """Catches wrong weights without a word, or an error from deep inside."""
    x = start()
    refusals: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: RemoteObservation(AdamW), TypeError, "made over the parameters"),  # type: ignore[arg-type]
        (lambda: RemoteObservation(RemoteObservation(SGD([x], lr=1))), ValueError, "wrapped already"),
        (
            lambda: RemoteObservation(RemoteObservation(SGD([x], lr=1)).optimizer, mu=0.3),
            ValueError,
            "inside another",
        ),
        (lambda: RemoteObservation(Exchanging([x], lr=1)), TypeError, "goes inside Horovod's wrapper"),
        (lambda: RemoteObservation(torch.optim.LBFGS([x])), TypeError, "LBFGS calls a closure several times"),
        (lambda: RemoteObservation(Adam([x], differentiable=True)), ValueError, "not differentiable"),
        (lambda: RemoteObservation(SGD([x], lr=1), mu=0.1, beta1=0.5), ValueError, "beta1 of at least 0.9"),
        (lambda: RemoteObservation(SGD([x], lr=1), mu=0.0), ValueError, "mu must be above 0"),
        (lambda: RemoteObservation(SGD([x], lr=1), mu=1.5), ValueError, "mu of RemoteObservation"),
        (lambda: RemoteObservation(SGD([x], lr=1), beta1="0.9"), TypeError, "beta1 of RemoteObservation"),  # type: ignore[arg-type]
    ]
    for make, kind, message in refusals:
        with pytest.raises(kind, match=message):
            make()
    optimizer = RemoteObservation(ReplacesData([x], lr=0.1))
    x.grad = torch.ones_like(x)
    with pytest.raises(RuntimeError, match="ReplacesData put other memory"):
        optimizer.step()
    sparse = nn.Parameter(torch.ones(3, 2))
    sparse.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        RemoteObservation(Adagrad([sparse])).step()


@pytest.mark.parametrize("mu", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_cautious_decay_is_that_of_the_inner_step(mu: float, dtype: torch.dtype) -> None:
    """Catches decay of the wrapper's whole movement, with the wrong sign, and none at μ = 1.

    The oracle: an AdamW that decays cautiously by itself, inside the plain wrapper.
    """

    class Cautious(AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            group = self.param_groups[0]
            (x,) = group["params"]
            old = x.detach().clone()
            super().step()
            kept = torch.where((old - x) * old >= 0, group["lr"] * 2.0 * old, 0.0)
            x.sub_(kept)

    settings = {"lr": 0.01, "betas": (0.0, 0.9), "weight_decay": 0.0, "foreach": False}
    x, y = nn.Parameter(start().detach().to(dtype)), nn.Parameter(start().detach().to(dtype))
    noisy = gradients()

    def gradient(step: int, point: Tensor) -> Tensor:
        return noisy(step, point.double()).to(dtype)

    ours = RemoteObservation(AdamW([x], **settings), mu=mu, beta1=0.9, cautious_weight_decay=2.0)
    theirs = RemoteObservation(Cautious([y], **settings), mu=mu, beta1=0.9)
    assert_same_path(
        run(ours, x, gradient), run(theirs, y, gradient), 1e-12 if dtype == torch.float64 else 0.05
    )
    alone = nn.Parameter(start().detach().to(dtype))
    plain = RemoteObservation(AdamW([alone], **settings), mu=mu, beta1=0.9)
    assert run(plain, alone, gradient)[-1].norm() > 1.2 * x.detach().norm()


def test_cautious_decay_beside_another_decay_is_refused() -> None:
    """Catches weights that decay twice, also in a group of their own, and a negative λ."""
    with pytest.raises(ValueError, match="weight_decay=0"):
        RemoteObservation(AdamW([start()]), cautious_weight_decay=0.1)
    with pytest.raises(ValueError, match="cautious_weight_decay"):
        RemoteObservation(SGD([start()], lr=0.1), cautious_weight_decay=-0.1)
    remote = RemoteObservation(SGD([start()], lr=0.1), cautious_weight_decay=0.1)
    with pytest.raises(ValueError, match="weight_decay=0"):
        remote.add_param_group({"params": [start()], "weight_decay": 0.1})
    remote.add_param_group({"params": [start()], "weight_decay": 0.1, "remote_cautious_weight_decay": 0.0})


def test_nesterovs_point_is_not_refused_for_a_rounding() -> None:
    """Catches μ = 1 − β1, as one writes it: 1 − 0.95 is a little more than 0.05."""
    RemoteObservation(SGD([start()], lr=0.1), mu=0.05, beta1=0.95)
    with pytest.raises(ValueError, match=r"at least 0\.95"):
        RemoteObservation(SGD([start()], lr=0.1), mu=0.05, beta1=0.94)
