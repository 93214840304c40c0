"""Measure curvature and noise of a loss, and say what the theory makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from arsg_dist import theory
from arsg_dist.optim.arsg import ARSG
from arsg_dist.optim.convert import is_decoupled
from arsg_dist.optim.hyperparameters import bias_correction
from arsg_dist.optim.remote_observation import RemoteObservation

Batch = TypeVar("Batch")

_EXACT: Final = 1e-9
"""Where a Krylov space ends, relative to the largest entry of its matrix."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What was measured of an optimizer's loss at its parameters; `print` it for the advice in words.

    Curvature is that after preconditioning, in units of 1/α.
    """

    lr: float
    """α of the first group: ARSG's lr, or RemoteObservation's lr over μ."""
    beta1: float
    """β1 of the first moment, or of the average movement."""
    mu: float
    """Observation factor."""
    lambda_max: float
    """Largest curvature that Lanczos' iterations found; there may be none that is larger."""
    noise: float
    """Variance of a batch's gradient, summed over all elements, after preconditioning."""
    batches: int
    """How many batches were measured."""
    products: int
    """How many Hessian-vector products of a batch it took."""

    @property
    def safe_lr(self) -> float:
        """Return the largest α that Theorem 1 calls safe; infinite without positive curvature."""
        if self.lambda_max <= 0:
            return math.inf
        return theory.largest_safe_step(self.beta1, self.mu, self.lambda_max)

    @property
    def largest_converging_lr(self) -> float:
        """Return the α from which on the steepest direction diverges; infinite without positive curvature."""
        if self.lambda_max <= 0:
            return math.inf
        return theory.convergence_bound(self.beta1, self.mu) / self.lambda_max

    def __str__(self) -> str:
        steepest = (
            f"largest curvature λ = {self.lambda_max:.3g} (after preconditioning; {self.products} Hessian-vector "
            f"products over {self.batches} batches)"
        )
        if self.lambda_max <= 0:
            return f"{steepest}\nno direction curves upwards here: the theory has no largest step"
        of_safe = self.lr / self.safe_lr
        lines = [
            steepest,
            f"α = {self.lr:.3g} is {of_safe:.3g} times the safe step (1+β1)/((1−β1+β1μ)λ) = {self.safe_lr:.3g}; "
            f"from {self.largest_converging_lr:.3g} on a quadratic diverges",
        ]
        if self.lr >= self.largest_converging_lr:
            lines.append("no stationary state at this α: lower it before μ is worth a thought")
        else:
            lines.append(self._of_noise())
        return "\n".join(lines)

    def _of_noise(self) -> str:
        def cost(mu: float) -> float:
            """Return the variance of x in the steepest direction, over what it is in a flat one."""
            return theory.stationary_variance(self.lr, self.beta1, mu, self.lambda_max, 1.0) * (
                2 * self.lambda_max / self.lr
            )

        text = (
            f"gradient noise keeps the loss up by about α·σ²/4 = {self.lr * self.noise / 4:.3g} in flat directions, "
            "whatever μ is"
        )
        try:
            best = theory.quietest_mu(self.lr * self.lambda_max, self.beta1)
            return (
                f"{text}; in the steepest one by {cost(self.mu):.3g} times as much per σ² at μ = {self.mu:g}, least "
                f"({cost(best):.3g} times) at μ = {best:.3g}: the best μ at a given α depends on curvature and β1, "
                "not on noise or batch; noise sets α"
            )
        except ValueError:
            return text


def advise(
    optimizer: Optimizer,
    loss: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    *,
    iterations: int = 20,
    seed: int = 0,
) -> Advice:
    """Measure the largest curvature, after preconditioning, and the gradient noise at an optimizer's parameters.

    Lanczos' method on the Hessian of the mean loss over the batches: `iterations` products per batch, and memory for
    some copies of the parameters. Neither parameters nor their gradients nor the state are changed; but the module does
    what it does: batch norm in training mode goes on with its running averages, so give a copy where that matters.
    Unwrapped, without DistributedDataParallel, on one process.

    The preconditioner is that of the optimizer's state; before the first step, the one that the batches' gradients
    would make in the long run.

    Args:
        optimizer: `ARSG`, or `RemoteObservation` around torch's SGD (without momentum), Adam or AdamW (betas[0] = 0).
        loss: of a batch, at the parameters.
        batches: of the size that is trained with; four or more for the noise.
        iterations: of Lanczos' method.
        seed: of its first vector.

    Raises:
        TypeError: another optimizer.
        ValueError: fewer than two batches; groups with different μ, β1 or kind of preconditioner; no parameters that
            the loss depends on.
    """
    if len(batches) < 2:
        raise ValueError(
            f"{len(batches)} batches: two at least are needed to measure noise, four or more are better"
        )
    lr, beta1, mu = alpha_beta1_mu(optimizer)
    groups = [
        (group, [param for param in group["params"] if param.requires_grad])
        for group in optimizer.param_groups
    ]
    params = [param for _, of_group in groups for param in of_group]
    gradients = [_gradient(loss(batch), params) for batch in batches]
    mean = [torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True)]
    square = [torch.stack(parts).square().mean(0) for parts in zip(*gradients, strict=True)]
    scales, decays = [], []
    squares = iter(square)
    for group, of_group in groups:
        relative = float(group["lr"]) / float(optimizer.param_groups[0]["lr"])
        for param in of_group:
            denominator = _denominator(optimizer, group, param, next(squares))
            scales.append((relative / denominator).sqrt())
            decays.append(_coupled_decay(group, optimizer))
    spread = [
        torch.stack(
            [
                ((g - m) * scale).square().sum(dtype=torch.float64)
                for g, m, scale in zip(parts, mean, scales, strict=True)
            ]
        ).sum()
        for parts in gradients
    ]

    def product(vector: list[Tensor]) -> list[Tensor]:
        direction = [part * scale for part, scale in zip(vector, scales, strict=True)]
        total = [decay * part for part, decay in zip(direction, decays, strict=True)]
        for batch in batches:
            for sum_, part in zip(total, _curvature(loss(batch), params, direction), strict=True):
                sum_.add_(part, alpha=1 / len(batches))
        return [part * scale for part, scale in zip(total, scales, strict=True)]

    largest, used = largest_eigenvalue(product, params, iterations, seed)
    return Advice(
        lr=lr,
        beta1=beta1,
        mu=mu,
        lambda_max=largest,
        noise=float(torch.stack(spread).sum() / (len(batches) - 1)),
        batches=len(batches),
        products=used * len(batches),
    )


def largest_eigenvalue(
    product: Callable[[list[Tensor]], list[Tensor]], like: Sequence[Tensor], iterations: int, seed: int = 0
) -> tuple[float, int]:
    """Return the largest eigenvalue of a symmetric operator by Lanczos' method, from below, and the products it took.

    Args:
        product: the operator, on lists of tensors.
        like: tensors of the shapes and dtypes that it acts on.
        iterations: at most; fewer where the space that the first vector spans is exhausted.
        seed: of the first vector.

    Raises:
        ValueError: no iterations, or a product that is not finite.
    """
    if iterations < 1:
        raise ValueError(f"iterations = {iterations}: at least one is needed")
    generator = torch.Generator().manual_seed(seed)
    vector = [
        torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device, tensor.dtype)
        for tensor in like
    ]
    norm = _dot(vector, vector) ** 0.5
    vector = [part / norm for part in vector]
    before: list[Tensor] | None = None
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(vector)
        diagonal.append(_dot(image, vector))
        if not math.isfinite(diagonal[-1]):
            raise ValueError(
                "a Hessian-vector product is not finite: the loss, or its curvature, is not here"
            )
        for part, of_vector in zip(image, vector, strict=True):
            part.sub_(of_vector, alpha=diagonal[-1])
        if before is not None:
            for part, of_before in zip(image, before, strict=True):
                part.sub_(of_before, alpha=beside[-1])
        norm = _dot(image, image) ** 0.5
        if len(diagonal) == iterations or norm <= _EXACT * max(map(abs, (*diagonal, *beside))):
            break
        beside.append(norm)
        before, vector = vector, [part / norm for part in image]
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, value in enumerate(beside):
        matrix[i, i + 1] = matrix[i + 1, i] = value
    return float(torch.linalg.eigvalsh(matrix)[-1]), len(diagonal)


def alpha_beta1_mu(optimizer: Optimizer) -> tuple[float, float, float]:
    """Return α of the first group, β1 and μ.

    Raises:
        TypeError: neither ARSG nor RemoteObservation.
        ValueError: groups with different β1 or μ, a learning rate of 0, or μ = 1.
    """
    if isinstance(optimizer, RemoteObservation):
        kinds = [
            (float(group["remote_mu"]), float(group["remote_beta1"])) for group in optimizer.param_groups
        ]
    elif isinstance(optimizer, ARSG):
        kinds = [(float(group["mu"]), float(group["betas"][0])) for group in optimizer.param_groups]
    else:
        raise TypeError(f"advise() is for ARSG and RemoteObservation, not {type(optimizer).__name__}")
    if len(set(kinds)) > 1:
        raise ValueError(
            f"the parameter groups have different mu and beta1 ({kinds}): the theory has one of each"
        )
    (mu, beta1), lr = kinds[0], float(optimizer.param_groups[0]["lr"])
    if lr == 0:
        raise ValueError("lr of the first group is 0: give the one that is trained with")
    if mu == 1:
        raise ValueError("mu = 1 is the inner optimizer alone, with no observation ahead")
    return (lr / mu if isinstance(optimizer, RemoteObservation) else lr), beta1, mu


def _denominator(optimizer: Optimizer, group: dict[str, Any], param: Tensor, square: Tensor) -> Tensor:
    """Return what a parameter's gradients are divided by; `square` is the mean of g² over the batches."""
    state = optimizer.state.get(param) or {}
    inner = optimizer.optimizer if isinstance(optimizer, RemoteObservation) else optimizer
    if isinstance(inner, SGD):
        if group["momentum"]:
            raise TypeError("advise() knows RemoteObservation around SGD without momentum only")
        return torch.ones_like(square)
    adaptive = isinstance(inner, Adam | AdamW)  # in torch 2.6 AdamW is no Adam
    if adaptive and group["betas"][0]:
        raise TypeError("advise() knows RemoteObservation around Adam and AdamW with betas[0] = 0 only")
    if not (adaptive or isinstance(optimizer, ARSG)):
        raise TypeError(f"advise() does not know the preconditioner of {type(inner).__name__}")
    if not adaptive and group["preconditioner"] == "none":
        return torch.ones_like(square)
    if not adaptive and group["preconditioner"] == "amsgrad":
        v_hat: Tensor = state.get("max_exp_avg_sq", square)
        return v_hat.to(square.dtype).clamp(min=max(group["eps"], torch.finfo(square.dtype).tiny)).sqrt()
    v = square
    if "exp_avg_sq" in state:
        corrected = adaptive or group["bias_correction"] != "none"
        v = state["exp_avg_sq"].to(square.dtype)
        v = v / bias_correction(float(group["betas"][1]), int(state["step"])) if corrected else v
    return v.sqrt().add(group["eps"]).clamp(min=torch.finfo(square.dtype).tiny)


def _coupled_decay(group: dict[str, Any], optimizer: Optimizer) -> float:
    inner = optimizer.optimizer if isinstance(optimizer, RemoteObservation) else optimizer
    return 0.0 if is_decoupled(group, inner) else float(group.get("weight_decay", 0.0))


def _gradient(loss: Tensor, params: list[Tensor]) -> list[Tensor]:
    parts = torch.autograd.grad(loss, params, allow_unused=True)
    if all(part is None for part in parts):
        raise ValueError("the loss depends on none of the optimizer's parameters")
    return [
        torch.zeros_like(param) if part is None else part for param, part in zip(params, parts, strict=True)
    ]


def _curvature(loss: Tensor, params: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    """Return the Hessian times a direction."""
    parts = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    pairs = [(part, along) for part, along in zip(parts, direction, strict=True) if part is not None]
    slope = torch.stack([(part * along).sum() for part, along in pairs]).sum()
    if not slope.requires_grad:  # linear
        return [torch.zeros_like(param) for param in params]
    found = torch.autograd.grad(slope, params, allow_unused=True)
    return [
        torch.zeros_like(param) if part is None else part for param, part in zip(params, found, strict=True)
    ]


def _dot(one: list[Tensor], other: list[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))
