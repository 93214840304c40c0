"""What is measured of a loss, on quadratics of which everything is known."""

import pytest
import torch
from torch import Tensor, nn

from arsg_dist import ARSG, RemoteObservation, theory
from arsg_dist.optim.advice import advise, largest_eigenvalue

torch.set_num_threads(1)

SPECTRUM = torch.logspace(-3, 1, 40, dtype=torch.float64)


def rotated(spectrum: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q
    return basis @ torch.diag(spectrum) @ basis.T


class Quadratic:
    """½ xᵀHx + bᵀx over two parameters, with another b in every batch."""

    def __init__(self, spectrum: Tensor = SPECTRUM, batches: int = 4) -> None:
        self.hessian = rotated(spectrum)
        size = len(spectrum)
        self.x = nn.Parameter(torch.linspace(-1, 2, size - 10, dtype=torch.float64))
        self.y = nn.Parameter(torch.ones(2, 5, dtype=torch.float64))
        generator = torch.Generator().manual_seed(1)
        self.batches = list(torch.randn(batches, size, generator=generator, dtype=torch.float64))

    def loss(self, b: Tensor) -> Tensor:
        point = torch.cat([self.x, self.y.flatten()])
        return point @ self.hessian @ point / 2 + b @ point


def test_the_curvature_of_a_known_spectrum_gives_the_safe_step_of_theorem_1() -> None:
    """Catches a mean that is a sum, a lost parameter, an α that is the inner lr, and a noise of one batch."""
    problem = Quadratic()
    rsg = ARSG([problem.x, problem.y], lr=0.5, betas=(0.9, 0.99), mu=0.2, preconditioner="none")
    found = advise(rsg, problem.loss, problem.batches, iterations=40)
    assert found.lambda_max == pytest.approx(10.0, rel=1e-9)
    assert found.safe_lr == pytest.approx(1.9 / ((0.1 + 0.18) * 10.0), rel=1e-9)
    assert found.noise == pytest.approx(torch.stack(problem.batches).var(0).sum().item(), rel=1e-9)
    assert found.largest_converging_lr == pytest.approx(theory.convergence_bound(0.9, 0.2) / 10.0)
    sgd = torch.optim.SGD([problem.x, problem.y], lr=0.1)
    remote = RemoteObservation(sgd, mu=0.2, beta1=0.9)
    assert vars(advise(remote, problem.loss, problem.batches, iterations=40)) == pytest.approx(vars(found))
    assert problem.x.grad is None
    assert len(rsg.state) == 0


@pytest.mark.parametrize("kind", ["amsgrad", "adam", "AdamW"])
@pytest.mark.parametrize("stepped", [False, True])
def test_the_curvature_is_that_after_the_preconditioner(kind: str, stepped: bool) -> None:
    """Catches a division on one side only, an uncorrected v, a group's own lr or decay left out.

    Expected: the largest eigenvalue of the dense matrix (H + λ) divided by √ of the denominators on both sides.
    """
    problem = Quadratic()
    groups = [{"params": [problem.x]}, {"params": [problem.y], "lr": 0.03}]
    if kind == "AdamW":
        inner = torch.optim.AdamW(groups, lr=0.01, betas=(0.0, 0.9), eps=0.1, weight_decay=0.3)
        optimizer: torch.optim.Optimizer = RemoteObservation(inner, mu=0.2, beta1=0.9)
    else:
        optimizer = ARSG(
            groups, lr=0.01, betas=(0.9, 0.9), mu=0.2, eps=0.1, weight_decay=0.3, preconditioner=kind
        )
    if stepped:
        for b in problem.batches[:3]:
            optimizer.zero_grad()
            problem.loss(b).backward()
            optimizer.step()
    squares = []
    for b in problem.batches:
        squares.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(problem.loss(b), [problem.x, problem.y])])
            ** 2
        )
    v = torch.stack(squares).mean(0)
    if stepped:
        name = "max_exp_avg_sq" if kind == "amsgrad" else "exp_avg_sq"
        v = torch.cat([optimizer.state[p][name].flatten() for p in (problem.x, problem.y)])
        v = v if kind == "amsgrad" else v / (1 - 0.9**3)
    denominator = v.clamp(min=0.1).sqrt() if kind == "amsgrad" else v.sqrt() + 0.1
    factor = torch.cat([torch.ones(30), torch.full((10,), 3.0)]).double() / denominator
    decay = 0.0 if kind == "AdamW" else 0.3  # AdamW's is decoupled
    matrix = factor.sqrt()[:, None] * (problem.hessian + decay * torch.eye(40).double()) * factor.sqrt()
    found = advise(optimizer, problem.loss, problem.batches, iterations=40)
    assert found.lambda_max == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-8)
    assert found.lr == pytest.approx(0.01 / (0.2 if kind == "AdamW" else 1.0))
    noise = (torch.stack(problem.batches).var(0) * factor).sum().item()
    assert found.noise == pytest.approx(noise, rel=1e-9)


def test_lanczos_ends_where_the_space_does_and_finds_the_largest_not_the_longest() -> None:
    """Catches a division by zero after an invariant space, and |λ| taken for λ where curvature is negative."""
    spectrum = torch.tensor([-5.0, 1.0, 2.0], dtype=torch.float64)
    matrix = rotated(spectrum)
    value, used = largest_eigenvalue(lambda v: [matrix @ v[0]], [spectrum], 20)
    assert value == pytest.approx(2.0)
    assert used == 3
    assert largest_eigenvalue(lambda v: [0.0 * v[0]], [spectrum], 20) == (0.0, 1)


def test_the_advice_in_words() -> None:
    """Catches numbers that are not those measured, and a best μ for an α that diverges."""
    problem = Quadratic()
    rsg = ARSG([problem.x, problem.y], lr=0.05, betas=(0.9, 0.99), mu=0.4, preconditioner="none")
    text = str(advise(rsg, problem.loss, problem.batches, iterations=40))
    safe = theory.largest_safe_step(0.9, 0.4, 10.0)
    assert "λ = 10 (after preconditioning; 160 Hessian-vector products over 4 batches)" in text
    assert f"α = 0.05 is {0.05 / safe:.3g} times the safe step" in text
    best = theory.quietest_mu(0.5, 0.9)
    cost = theory.stationary_variance(0.05, 0.9, best, 10.0, 1.0) * 400
    assert f"least ({cost:.3g} times) at μ = {best:.3g}" in text
    assert "not on noise or batch" in text
    rsg.param_groups[0]["lr"] = 50.0
    assert "no stationary state" in str(advise(rsg, problem.loss, problem.batches, iterations=40))
    flat = Quadratic(-SPECTRUM)
    rsg = ARSG([flat.x, flat.y], preconditioner="none")
    assert "no direction curves upwards" in str(advise(rsg, flat.loss, flat.batches, iterations=40))


def test_what_the_theory_does_not_know_is_refused() -> None:
    """Catches an advice about another method than the user's."""
    problem = Quadratic()

    def ask(optimizer: torch.optim.Optimizer, batches: int = 2) -> None:
        advise(optimizer, problem.loss, problem.batches[:batches], iterations=2)

    both = [problem.x, problem.y]
    with pytest.raises(TypeError, match="ARSG and RemoteObservation, not SGD"):
        ask(torch.optim.SGD(both, lr=0.1))
    with pytest.raises(TypeError, match="without momentum"):
        ask(RemoteObservation(torch.optim.SGD(both, lr=0.1, momentum=0.9)))
    with pytest.raises(TypeError, match=r"betas\[0\] = 0"):
        ask(RemoteObservation(torch.optim.AdamW(both)))
    with pytest.raises(TypeError, match="Adagrad"):
        ask(RemoteObservation(torch.optim.Adagrad(both)))
    with pytest.raises(ValueError, match="different mu"):
        ask(ARSG([{"params": [problem.x], "mu": 0.2}, {"params": [problem.y]}]))
    with pytest.raises(ValueError, match="1 batches"):
        ask(ARSG(both), batches=1)
    with pytest.raises(ValueError, match="mu = 1"):
        ask(RemoteObservation(torch.optim.SGD(both, lr=0.1), mu=1.0))
