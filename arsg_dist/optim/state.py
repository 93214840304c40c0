"""Make, save and load each parameter's state, keeping its dtypes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.optim.hyperparameters import STATE_DTYPES, compute_dtype

MOMENTS: Final[dict[str, tuple[str, ...]]] = {
    "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "none": ("exp_avg",),
}
"""Names of the moments each preconditioner keeps."""

_COMPLEX: Final = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def needs_step(group: dict[str, Any]) -> bool:
    """Say whether the group's update depends on the number of steps taken."""
    return bool(
        group["preconditioner"] == "adam" or group["lookahead_k"] > 0 or group["state_dtype"] == "bfloat16"
    )


def new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter before its first step.

    Moments are zero, in the layout of the parameter. v̂ starts below its floor ε, which every step applies.

    Returns:
        `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq` as far as the preconditioner needs them, of the parameter's
        shape, in `moment_dtype`; `slow_param` (copy of the parameter, in its computing dtype) with lookahead;
        `step` where `needs_step`: a Python int, or with capturable a 0-dim float32 tensor on the parameter's
        device.
    """
    dtype = moment_dtype(param, group["state_dtype"])
    state: dict[str, Any] = {
        name: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for name in MOMENTS[group["preconditioner"]]
    }
    if needs_step(group):
        state["step"] = new_step(0, param, group["capturable"])
    if group["lookahead_k"] > 0:
        slow_param = torch.empty_like(param, dtype=moment_dtype(param, None), requires_grad=False)
        state["slow_param"] = slow_param.copy_(param.detach())
    return state


def required(state: dict[str, Any], name: str) -> Any:
    """Return an entry of a parameter's state.

    Raises:
        RuntimeError: there is state, but not this entry.
    """
    try:
        return state[name]
    except KeyError:
        raise RuntimeError(
            f"optimizer state has {sorted(state)} but no {name!r}: it was made with other settings "
            "(preconditioner, lookahead_k or state_dtype changed after the first step), or a checkpoint lost "
            "it; restart() rebuilds a lost max_exp_avg_sq"
        ) from None


def new_step(count: int, param: Tensor, capturable: bool) -> int | Tensor:
    """Return a step count as the group wants it."""
    return torch.full((), count, dtype=torch.float32, device=param.device) if capturable else count


def count_step(state: dict[str, Any], param: Tensor, capturable: bool) -> None:
    """Add one to an int count, after bringing one of the wrong kind in order.

    Of the wrong kind is a count that an engine loaded, or from before settings changed.

    Tensor counts are left to the caller, who adds to all of them at once.
    """
    step = required(state, "step")
    if not isinstance(step, Tensor if capturable else int):
        state["step"] = step = new_step(int(step), param, capturable)
    if not capturable:
        state["step"] = step + 1


def moment_dtype(param: Tensor, state_dtype: str | None) -> torch.dtype:
    """Return the dtype of moments: `state_dtype`, or that of the arithmetic.

    Raises:
        ValueError: for bfloat16 moments of a complex parameter, which have no complex counterpart.
    """
    dtype = STATE_DTYPES[state_dtype] if state_dtype is not None else compute_dtype(param.dtype)
    if not param.is_complex():
        return dtype
    if dtype not in _COMPLEX:
        raise ValueError(f"state_dtype={state_dtype} is not available for complex parameters ({param.dtype})")
    return _COMPLEX[dtype]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing memory; others as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def real(tensor: Tensor) -> Tensor:
    """Return complex tensors as real, (..., 2), sharing memory; others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclass(slots=True)
class TensorLists:
    """Parallel lists for one call of a `StepFunction`, which documents them."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)

    def append(self, param: Tensor, grad: Tensor, state: dict[str, Any], preconditioner: str) -> None:
        """Add one parameter."""
        self.params.append(param)
        self.grads.append(grad)
        # Without strict=False, which torch 2.6's compiler takes for True.
        for moments, name in zip(  # noqa: B905
            (self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs), MOMENTS[preconditioner]
        ):
            moments.append(real(local(required(state, name))))
        if "step" in state:
            self.steps.append(state["step"])


class _KeepDtype:
    """Shield a state tensor from torch's load_state_dict, which would cast it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def shield_dtypes(state_dict: dict[str, Any], *, only: str | None = None) -> dict[str, Any]:
    """Return a state_dict, tensors shared, that torch's load will not cast.

    Args:
        state_dict: as `Optimizer.state_dict` makes it.
        only: the entry to shield; None for all.
    """
    shielded = {
        index: {
            name: _KeepDtype(value) if isinstance(value, Tensor) and only in (None, name) else value
            for name, value in entry.items()
        }
        if isinstance(entry, dict)
        else entry
        for index, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": shielded}


def unshielded(value: Any) -> Any:
    """Return the value that `shield_dtypes` shielded; others as they are."""
    return value.tensor if isinstance(value, _KeepDtype) else value


def restore_loaded(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Bring loaded state to the parameter's device and the group's dtypes.

    Precision that the source has is kept: float32 moments of a bfloat16 parameter stay float32.
    """
    dtypes: dict[str, torch.dtype] = dict.fromkeys(
        MOMENTS["amsgrad"], moment_dtype(param, group["state_dtype"])
    )
    dtypes["slow_param"] = moment_dtype(param, None)
    for name, value in state.items():
        loaded = unshielded(value)
        if name == "step":
            state[name] = new_step(int(loaded), param, group["capturable"])
        elif isinstance(loaded, Tensor):
            state[name] = loaded.to(device=param.device, dtype=dtypes.get(name, loaded.dtype))
    if group["state_dtype"] == "bfloat16" and group["preconditioner"] != "adam" and "exp_avg" in state:
        # Moments saved in float32 without a count: stochastic rounding may count from any number.
        state.setdefault("step", new_step(0, param, group["capturable"]))
