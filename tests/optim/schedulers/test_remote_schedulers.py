"""ObservationBoost and Beta1Warmup around RemoteObservation."""

import pytest
import torch
from torch import nn

from arsg_dist import ARSG, Beta1Warmup, ObservationBoost, RemoteObservation, theory

torch.set_num_threads(1)


def pair() -> tuple[RemoteObservation, ARSG, list[nn.Parameter]]:
    """RemoteObservation around SGD, and the RSG that it equals; two groups with settings of their own."""
    xs = [nn.Parameter(torch.linspace(-1, 2, 6, dtype=torch.float64)) for _ in range(4)]
    own = [(0.05, 0.99, 0.3), (0.1, 0.999, 0.1)]  # μ, β1, α
    sgd = torch.optim.SGD(
        [
            {"params": [x], "lr": mu * lr, "remote_mu": mu, "remote_beta1": beta1}
            for x, (mu, beta1, lr) in zip(xs[:2], own, strict=True)
        ],
        lr=1.0,
    )
    rsg = ARSG(
        [
            {"params": [x], "lr": lr, "mu": mu, "betas": (beta1, 0.9)}
            for x, (mu, beta1, lr) in zip(xs[2:], own, strict=True)
        ],
        preconditioner="none",
    )
    return RemoteObservation(sgd), rsg, xs


def train(optimizers: list, schedulers: list, xs: list[nn.Parameter], steps: int) -> None:
    curvature = torch.logspace(-2, 0, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        noise = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        for i, x in enumerate(xs):
            x.grad = curvature * x.detach() + noise[i % 2]
        for each in (*optimizers, *schedulers):
            each.step()


def test_a_boost_around_sgd_is_that_of_rsg() -> None:
    """Catches the inner lr scaled as α, the inner optimizer's names taken, and a movement that keeps the old α."""
    remote, rsg, xs = pair()
    boosts = [ObservationBoost(optimizer, milestones=[100, 200]) for optimizer in (remote, rsg)]
    train([remote, rsg], boosts, xs, 300)
    for ours, theirs in zip(xs[:2], xs[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert [group["remote_mu"] for group in remote.param_groups] == [0.2, 0.4]
    first = remote.param_groups[0]
    ratio = theory.boost_ratio(0.99, 0.05, 0.2)
    assert first["lr"] == pytest.approx(0.05 * 0.3 * ratio * 4)
    with pytest.raises(ValueError, match="would not stay below 1"):
        ObservationBoost(RemoteObservation(torch.optim.SGD([xs[0]], lr=0.1), mu=0.6), milestones=[1])


def test_a_warm_up_of_beta1_around_sgd_is_that_of_rsg() -> None:
    """Catches a warm-up of the inner optimizer's betas, or of a copy of the settings."""
    remote, rsg, xs = pair()
    for optimizer in (remote, rsg):
        for group in optimizer.param_groups:  # from 0.95 on, where the smaller μ is Nesterov's point
            assert group.get("remote_mu", group.get("mu")) >= 0.05
    warmups = [Beta1Warmup(optimizer, 100, start=0.95) for optimizer in (remote, rsg)]
    assert [group["remote_beta1"] for group in remote.param_groups] == [0.95, 0.95]
    train([remote, rsg], warmups, xs, 200)
    assert [group["remote_beta1"] for group in remote.param_groups] == [0.99, 0.999]
    for ours, theirs in zip(xs[:2], xs[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_start_that_the_observation_cannot_have_is_refused() -> None:
    """Catches γ < 0 in the first steps: μ is below 1 − β1 there."""
    remote, _, _ = pair()
    with pytest.raises(ValueError, match=r"param_groups\[0\].*give start=0.95"):
        Beta1Warmup(remote, 10)


def test_the_inner_optimizers_own_betas_and_preconditioner_are_left_alone() -> None:
    """Catches a refusal for the inner bias correction, which has nothing to do with the average that looks ahead."""
    x = nn.Parameter(torch.ones(2))
    inner = ARSG([x], betas=(0.0, 0.99), mu=0.0, preconditioner="adam")
    remote = RemoteObservation(inner, mu=0.2, beta1=0.99)
    Beta1Warmup(remote, 10)
    ObservationBoost(remote, milestones=[1])
    group = remote.param_groups[0]
    assert (group["remote_beta1"], group["betas"], group["mu"]) == (0.9, (0.0, 0.99), 0.0)


def test_adam_without_correction_of_the_first_moment_may_warm_up() -> None:
    """Catches a refusal of what needs the warm-up: only 1 − β1ᵗ presumes a constant β1."""
    x = nn.Parameter(torch.ones(2))
    Beta1Warmup(ARSG([x], preconditioner="adam", bias_correction="second"), 10)
    with pytest.raises(ValueError, match="bias_correction='second'"):
        Beta1Warmup(ARSG([x], preconditioner="adam"), 10)
