"""Validate a group's settings, and hold those that the update reads."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from typing import Any, Final, Literal, Protocol, get_args, overload

import torch
from torch import Tensor

Preconditioner = Literal["amsgrad", "adam", "none"]
PRECONDITIONERS: tuple[str, ...] = get_args(Preconditioner)

BiasCorrection = Literal["both", "second", "none"]
BIAS_CORRECTIONS: tuple[str, ...] = get_args(BiasCorrection)

EIGHT_BIT: Final = "8bit"
"""A `state_dtype` that is no dtype of torch: see kernels/eight_bit.py."""
STATE_DTYPES: Final[dict[str, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    EIGHT_BIT: torch.float32,
}
"""What moments are to those who read them."""

# A β1 this close to 1 averages over so many steps that lookahead's pulling back mostly cancels the momentum.
LOOKAHEAD_BETA1_LIMIT: Final = 0.99

Steps = Sequence[int] | Sequence[Tensor]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Hyperparameters:
    """The settings of one group that the update reads, for one step.

    A setting with a default is a mode of the update, off (at its default) unless a group switches it on. A path that
    does not know a mode leaves its groups to the reference (`uses_only`), so that a new mode is a field here and a line
    there.

    `lr` and `mu` are Python floats unless the group is capturable or the step is being compiled; then each
    may be a 0-dim floating-point tensor that must not be read on the host. All other numbers are floats.
    """

    lr: float | Tensor
    """Learning rate α ≥ 0."""
    beta1: float
    """Decay β1 of the first moment, in [0, 1)."""
    beta2: float
    """Decay β2 of the second moment, in [0, 1)."""
    mu: float | Tensor
    """Observation factor μ, in [0, 1)."""
    eps: float
    """ε ≥ 0. "amsgrad": floor of v̂, inside the root; "adam": added to the root; "none": unused."""
    weight_decay: float
    """λ ≥ 0."""
    preconditioner: Preconditioner
    """Which denominator."""
    decoupled_weight_decay: bool = False
    """x ← x(1 − αλ) first (AdamW), instead of g ← g + λx."""
    maximize: bool = False
    """g ← −g before everything else."""
    cautious_weight_decay: bool = False
    """Decoupled decay only of elements that the update moves towards 0, or not at all (arXiv 2510.12402)."""
    bias_correction: BiasCorrection = "both"
    """Which moments preconditioner "adam" corrects for their start at 0; the others correct none."""
    precondition_first: bool = False
    """m averages preconditioned gradients (LaProp's order), instead of gradients."""
    capturable: bool = False
    """`steps` are 0-dim float32 tensors on the parameters' device and nothing may synchronise."""
    gradient_factor: float | Tensor = 1.0
    """g is multiplied by it before everything else: what undoes a loss scale, and clips. No setting of a group; a 0-dim
    float32 tensor on the parameters' device, or a float."""
    found_inf: Tensor | None = None
    """Where it is not 0, nothing changes. Likewise; given to `fused_step` only."""

    @staticmethod
    def validated(group: Mapping[str, Any]) -> dict[str, Any]:
        """Check all settings of a group; return them in canonical types.

        Floats, a tuple of betas, the name of a dtype.

        Args:
            group: a parameter group with every setting present; other keys are ignored.

        Raises:
            ValueError: a value out of its range, or settings that contradict each other.
            TypeError: a value of the wrong kind.
        """
        foreach, fused = _flag(group, "foreach", optional=True), _flag(group, "fused", optional=True)
        if fused and foreach:
            raise ValueError("`fused` and `foreach` cannot be `True` together.")
        for name in ("lr", "mu"):
            if isinstance(group[name], Tensor) and foreach and not _flag(group, "capturable"):
                raise ValueError(
                    f"{name} as a Tensor is not supported for capturable=False and foreach=True: "
                    "give a float, or capturable=True"
                )
        if group["preconditioner"] not in PRECONDITIONERS:
            raise ValueError(
                f"Invalid preconditioner: {group['preconditioner']!r}, must be one of {PRECONDITIONERS}"
            )
        if _flag(group, "cautious_weight_decay") and not _flag(group, "decoupled_weight_decay"):
            raise ValueError(
                "cautious_weight_decay=True needs decoupled_weight_decay=True: it is a kind of decoupled decay, "
                "x ← x(1 − αλ) where the update does not move x away from 0"
            )
        bias_correction = _bias_correction(group)
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers, got {betas!r}")
        lookahead_k = group["lookahead_k"]
        if isinstance(lookahead_k, bool) or not isinstance(lookahead_k, int):
            raise TypeError(f"lookahead_k must be an int (0 switches it off), got {lookahead_k!r}")
        if lookahead_k < 0:
            raise ValueError(f"Invalid lookahead_k: {lookahead_k}, must be >= 0")
        return {
            "lr": _number_or_tensor(group, "lr"),
            "betas": tuple(number(f"betas[{i}]", beta, below=1.0) for i, beta in enumerate(betas)),
            "eps": number("eps", group["eps"]),
            "weight_decay": number("weight_decay", group["weight_decay"]),
            "mu": _number_or_tensor(group, "mu", below=1.0),
            "bias_correction": bias_correction,
            **{mode: _flag(group, mode) for mode, off in MODES.items() if off is False},
            "state_dtype": state_dtype_name(group["state_dtype"]),
            "master": _master(group),
            "lookahead_alpha": number("lookahead_alpha", group["lookahead_alpha"], at_most=1.0),
            "count_steps": _flag(group, "count_steps"),
        }

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> Hyperparameters:
        """Read a parameter group; tensors for lr and μ become floats where allowed.

        Raises:
            ValueError: β1 was set to 1 or more, or is cycled by a scheduler.
        """
        keep_tensors = group.get("capturable", False) or torch.compiler.is_compiling()
        beta1, beta2 = group["betas"]
        if "max_momentum" in group:  # what OneCycleLR and CyclicLR leave in a group whose betas[0] they cycle
            raise ValueError(
                "a scheduler cycles betas[0] between values meant for Adam (OneCycleLR and CyclicLR do, with 0.85 and "
                "0.95 as they are): give it cycle_momentum=False to cycle lr only"
            )
        if not 0.0 <= beta1 < 1.0:
            raise ValueError(f"Invalid betas[0]: {beta1}, must be >= 0 and < 1")
        return cls(
            lr=scalar(group["lr"], keep_tensors),
            beta1=beta1,
            beta2=beta2,
            mu=scalar(group["mu"], keep_tensors),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            preconditioner=group["preconditioner"],
            # A group that a run saved before a mode existed has none of it.
            **{name: group.get(name, off) for name, off in MODES.items()},
        )

    def uses_only(self, modes: Container[str]) -> bool:
        """Say whether every mode that is on is one of these, which a path implements."""
        return not any(getattr(self, name) != off for name, off in MODES.items() if name not in modes)

    def floor(self, dtype: torch.dtype) -> float:
        """Return the least v̂: ε, but no less than the `dtype`'s least normal number.

        So ε = 0 with a zero gradient, a gradient whose square underflows, and padding reloaded as 0 all
        divide by something positive.
        """
        return max(self.eps, torch.finfo(dtype).tiny)

    @property
    def opposed_decay(self) -> float:
        """Return the decoupled λ of elements that the update moves away from 0."""
        return self.weight_decay if self.decoupled_weight_decay and not self.cautious_weight_decay else 0.0

    @property
    def corrects_first(self) -> bool:
        """Say whether the update divides m by 1 − β1ᵗ."""
        return self.preconditioner == "adam" and self.bias_correction == "both"

    @property
    def corrects_second(self) -> bool:
        """Say whether the update divides v by 1 − β2ᵗ."""
        return self.preconditioner == "adam" and self.bias_correction != "none"

    @property
    def observation_distance(self) -> float | Tensor:
        """Return η = μβ1/(1 − β1), by which x runs ahead of the base iterate θ."""
        return self.mu * (self.beta1 / (1.0 - self.beta1))


MODES: Final[dict[str, Any]] = {
    field.name: field.default
    for field in fields(Hyperparameters)
    if field.default is not MISSING and field.name not in ("gradient_factor", "found_inf")
}
"""Settings that switch something on, with the value that is off."""


class StepFunction(Protocol):
    """One update of many parameters in place; the signature shared by the reference, foreach and fused paths.

    All lists are as long as `params` except those the preconditioner does not need, which are empty:
    "amsgrad" uses all three moments, "adam" no `max_exp_avg_sqs`, "none" only `exp_avgs`; `steps` is empty
    unless the update needs it ("adam", or moments in fewer than 32 bits).

    Within one call all tensors are real floating-point, on one device; the parameters share one dtype, the
    gradients share one, and all moments share one, or are all `EightBit`. Shapes and strides are arbitrary (scalars
    and zero-size tensors included); the tensors of one parameter have one shape. Arithmetic is done in
    `compute_dtype(parameter dtype)`; moments in fewer than 32 bits are stored by `eight_bit.store_rounded`, so the
    result is a function of the arguments alone.

    Args:
        params: x, changed in place.
        grads: gradients at x; must not be changed.
        exp_avgs: m, changed in place.
        exp_avg_sqs: v, changed in place.
        max_exp_avg_sqs: v̂, changed in place.
        steps: number t of this update per parameter, counted from 1 (already incremented): Python ints, or
            0-dim float32 tensors if `hyper.capturable`. Must not be changed.
        hyper: the group's settings.
        corrections: of bfloat16 parameters, int16 (split_master.py), changed in place; empty where there are none.
        firsts: where each parameter's first element is in the memory of the whole parameter, for stochastic rounding;
            empty where they are whole.
    """

    def __call__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        steps: Steps,
        *,
        hyper: Hyperparameters,
        corrections: Sequence[Tensor] = (),
        firsts: Sequence[int] = (),
    ) -> None:
        """Update the parameters and moments."""
        ...


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, complex128, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


@overload
def bias_correction(beta: float, t: int) -> float: ...
@overload
def bias_correction(beta: float, t: Tensor) -> Tensor: ...
def bias_correction(beta: float, t: int | Tensor) -> float | Tensor:
    """Return 1 − βᵗ, of a tensor t without cancellation at small t and β near 1."""
    if isinstance(t, Tensor):
        return -torch.expm1(t * math.log(beta)) if beta > 0 else torch.ones_like(t)
    return 1.0 - beta**t


def scalar(value: float | Tensor, keep_tensor: bool) -> float | Tensor:
    """Return a setting as a float, or as a 0-dim tensor that the host must not read."""
    if isinstance(value, Tensor):
        return value.squeeze() if keep_tensor else float(value.item())
    return value


def number(name: str, value: Any, *, below: float = float("inf"), at_most: float = float("inf")) -> float:
    """Return a setting as a float of at least 0.

    Args:
        name: for the message.
        value: as the user gave it.
        below: the number must be less.
        at_most: the number must not be more.

    Raises:
        ValueError: it is out of range.
        TypeError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    number = float(value)
    _check_range(name, number, below, at_most)
    return number


def _number_or_tensor(group: Mapping[str, Any], name: str, *, below: float = float("inf")) -> float | Tensor:
    value = group[name]
    if not isinstance(value, Tensor):
        return number(name, value, below=below)
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"Tensor {name} must be floating point, got {value.dtype}")
    if value.device.type != "meta":
        _check_range(name, float(value.item()), below, float("inf"))
    return value


def _check_range(name: str, number: float, below: float, at_most: float) -> None:
    if not (0.0 <= number < below and number <= at_most):
        upper = f" and < {below}" if below != float("inf") else ""
        upper += f" and <= {at_most}" if at_most != float("inf") else ""
        raise ValueError(f"Invalid {name}: {number}, must be finite, >= 0{upper}")


def _bias_correction(group: Mapping[str, Any]) -> str:
    value = group["bias_correction"]
    if isinstance(value, bool):
        raise TypeError(
            f"bias_correction = {value!r} is Adam's of other libraries: write {'both' if value else 'none'!r} "
            f"(it is one of {BIAS_CORRECTIONS})"
        )
    if value not in BIAS_CORRECTIONS:
        raise ValueError(f"Invalid bias_correction: {value!r}, must be one of {BIAS_CORRECTIONS}")
    if value == "second" and group["preconditioner"] != "adam":
        raise ValueError(
            f"bias_correction='second' is for preconditioner 'adam': {group['preconditioner']!r} corrects no moment"
        )
    return str(value)


def _master(group: Mapping[str, Any]) -> str | None:
    value = group["master"]
    if value is None:
        return None
    if value != "split":
        raise ValueError(f"Invalid master: {value!r}, must be None or 'split'")
    if group["lookahead_k"] > 0:
        raise ValueError(
            "master='split' does not go with lookahead_k: lookahead sets the parameters from float32 copies of its own"
        )
    return "split"


def _flag(group: Mapping[str, Any], name: str, *, optional: bool = False) -> bool | None:
    value = group[name]
    if isinstance(value, bool) or (optional and value is None):
        return value
    raise TypeError(f"{name} must be True or False{' or None' if optional else ''}, got {value!r}")


def state_dtype_name(value: str | torch.dtype | None) -> str | None:
    """Return the name of a `state_dtype`: not every checkpoint stores a torch.dtype.

    Raises:
        ValueError: not one of `STATE_DTYPES`.
    """
    name = str(value).removeprefix("torch.")
    if value is None:
        return None
    if name not in STATE_DTYPES:
        raise ValueError(f"Invalid state_dtype: {value!r}, must be None or one of {tuple(STATE_DTYPES)}")
    return name
