"""Make, save and load each parameter's state, keeping its dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.optim.hyperparameters import EIGHT_BIT, STATE_DTYPES, compute_dtype
from arsg_dist.optim.kernels.eight_bit import SLOTS, EightBit, plain
from arsg_dist.optim.kernels.split_master import CORRECTION

MOMENTS: Final[dict[str, tuple[str, ...]]] = {
    "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adam": ("exp_avg", "exp_avg_sq"),
    "none": ("exp_avg",),
}
"""Names of the moments each preconditioner keeps."""

EIGHT_BIT_FROM: Final = 4096
"""Elements of a tensor, or of this rank's part, from which on its moments are in 8 bits where that is asked for.

What has fewer (biases, scales of norms) would save nothing and has elements of different kinds in one block.
"""

_COMPLEX: Final = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def needs_step(group: dict[str, Any]) -> bool:
    """Say whether the group's update depends on the number of steps taken."""
    return bool(
        group["preconditioner"] == "adam"
        or group["lookahead_k"] > 0
        or group["state_dtype"] in ("bfloat16", EIGHT_BIT)
    )


def new_state(param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a parameter before its first step.

    Moments are zero, in the layout of the parameter. v̂ starts below its floor ε, which every step applies.

    Returns:
        `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq` as far as the preconditioner needs them, of the parameter's
        shape, in `moment_dtype`, or `EightBit`; `slow_param` (copy of the parameter, in its computing dtype) with
        lookahead; `correction` with master "split"; `step` where `needs_step`: a Python int, or with capturable a 0-dim
        float32 tensor on the parameter's device.
    """
    dtype = moment_dtype(param, group["state_dtype"])
    eight_bit = in_eight_bits(param, group)
    state: dict[str, Any] = {
        name: _new_eight_bit(param, name)
        if eight_bit
        else torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for name in MOMENTS[group["preconditioner"]]
    }
    if group.get("master") == "split":
        state[CORRECTION] = new_correction(param)
    if needs_step(group):
        state["step"] = new_step(0, param, group["capturable"])
    if group["lookahead_k"] > 0:
        slow_param = torch.empty_like(param, dtype=moment_dtype(param, None), requires_grad=False)
        state["slow_param"] = slow_param.copy_(param.detach())
    return state


def in_eight_bits(param: Tensor, group: dict[str, Any]) -> bool:
    """Say whether the moments of a parameter are `EightBit`."""
    return group["state_dtype"] == EIGHT_BIT and local(param).numel() >= EIGHT_BIT_FROM


def has_eight_bit_state(optimizer: Any) -> bool:
    """Say whether an optimizer keeps, or is to keep, moments in 8 bits."""
    return any(group.get("state_dtype") == EIGHT_BIT for group in optimizer.param_groups)


def keep_form(state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Bring moments, and the correction, that somebody else has put into the state into their form."""
    if in_eight_bits(param, group):
        for name in MOMENTS[group["preconditioner"]]:
            if not isinstance(local(required(state, name)), EightBit):
                state[name] = _to_eight_bit(state[name], param, name)
    if group.get("master") == "split" and CORRECTION not in state:
        state[CORRECTION] = new_correction(param)


def new_correction(param: Tensor) -> Tensor:
    """Return the correction of a master that is the parameter.

    Raises:
        ValueError: the parameter is not in bfloat16, so its master is somebody else's.
    """
    if param.dtype != torch.bfloat16:
        raise ValueError(f"master='split' is for parameters in bfloat16, not {param.dtype}: leave it out")
    return torch.zeros_like(
        param, dtype=torch.int16, memory_format=torch.preserve_format, requires_grad=False
    )


def _new_eight_bit(param: Tensor, name: str) -> Tensor:
    return _shard_like(EightBit.zeros_like(local(param.detach()), SLOTS[name]), param)


@torch.no_grad()
def _to_eight_bit(value: Tensor, param: Tensor, name: str) -> Tensor:
    """Return a moment of a parameter in 8 bits, on its device."""
    own = local(value)
    if isinstance(own, EightBit):
        moved = own.to(param.device)
    else:
        moved = EightBit.zeros_like(local(param), SLOTS[name])
        moved.copy_(own)
    return _shard_like(moved, param)


def _shard_like(own: Tensor, param: Tensor) -> Tensor:
    """Return this rank's part as a DTensor where the parameter is one."""
    if not hasattr(param, "to_local"):
        return own
    from torch.distributed.tensor import DTensor

    sharded: Any = param
    return DTensor.from_local(
        own,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


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
        ValueError: for moments in fewer bits of a complex parameter, which have no complex counterpart; in 8 bits of
            float64 parameters.
    """
    if state_dtype == EIGHT_BIT and (param.is_complex() or param.dtype == torch.float64):
        raise ValueError(f"state_dtype='8bit' is not available for parameters in {param.dtype}")
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


def set_places(param: Tensor, places: Sequence[tuple[int, int, int]]) -> None:
    """Note where elements of an engine's flat parameter are in the whole parameters, for stochastic rounding.

    Args:
        param: what the optimizer updates, 1-D and contiguous.
        places: first element here, number of elements, first element in the memory of the whole parameter. What is in
            none of them (padding) is not updated where moments are rounded.
    """
    param._arsg_places = tuple(places)  # type: ignore[attr-defined]


def places_of(param: Tensor, group: dict[str, Any]) -> Sequence[tuple[int, int, int]] | None:
    """Return what `set_places` noted, or where this rank's part of a DTensor is, if the rounding depends on it."""
    if group["state_dtype"] != "bfloat16":
        return None
    if not hasattr(param, "_arsg_places"):
        if not hasattr(param, "to_local"):
            return None
        param._arsg_places = _place_of_shard(param)  # type: ignore[attr-defined]
    places: Sequence[tuple[int, int, int]] | None = param._arsg_places  # type: ignore[attr-defined]
    return places


def _place_of_shard(param: Tensor) -> Sequence[tuple[int, int, int]] | None:
    """Find the place of a DTensor's own part; None where it is no stretch of the whole one's memory, or all of it."""
    own = local(param)
    if not param.dim() or not own.numel() or not own.is_contiguous():
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = param
    shape, begins = compute_local_shape_and_global_offset(
        param.shape, sharded.device_mesh, sharded.placements
    )
    if tuple(shape[1:]) != tuple(param.shape[1:]):
        return None  # divided along another dimension than the first
    return ((0, own.numel(), begins[0] * math.prod(param.shape[1:])),)


@dataclass(slots=True)
class TensorLists:
    """Parallel lists for one call of a `StepFunction`, which documents them."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)
    corrections: list[Tensor] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    counters: list[Any] = field(default_factory=list)
    """The step counts, each once."""

    def append(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        preconditioner: str,
        places: Sequence[tuple[int, int, int]] | None = None,
    ) -> None:
        """Add one parameter, or the parts of it.

        Args:
            param: x, as the update sees it.
            grad: likewise.
            state: of the parameter.
            preconditioner: of its group.
            places: see `places_of`.
        """
        columns = [self.params, self.grads]
        tensors = [param, grad if places is None else grad.contiguous()]
        # Without strict=False, which torch 2.6's compiler takes for True.
        for moments, name in zip(  # noqa: B905
            (self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs), MOMENTS[preconditioner]
        ):
            columns.append(moments)
            tensors.append(real(local(required(state, name))))
        if CORRECTION in state:
            columns.append(self.corrections)
            tensors.append(local(state[CORRECTION]))
        if places is None:
            parts, firsts = [tensors], [0]
        else:
            firsts = [first for _, _, first in places]
            parts = [
                [tensor.view(-1).narrow(0, offset, numel) for tensor in tensors]
                for offset, numel, _ in places
            ]
        if "step" in state:
            self.counters.append(state["step"])
        for part, first in zip(parts, firsts, strict=True):
            for column, tensor in zip(columns, part, strict=True):
                column.append(tensor)
            self.firsts.append(first)
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
    eight_bit = in_eight_bits(param, group)
    for name, value in state.items():
        loaded = unshielded(value)
        if name == "step":
            state[name] = new_step(int(loaded), param, group["capturable"])
        elif isinstance(loaded, Tensor) and name in SLOTS and eight_bit:
            state[name] = _to_eight_bit(loaded, param, name)
        elif isinstance(loaded, Tensor):
            loaded = _plain(loaded, param)
            state[name] = loaded.to(device=param.device, dtype=dtypes.get(name, loaded.dtype))
    if group.get("master") != "split":
        state.pop(CORRECTION, None)
    if (
        group["state_dtype"] in ("bfloat16", EIGHT_BIT)
        and group["preconditioner"] != "adam"
        and "exp_avg" in state
    ):
        # Moments saved in float32 without a count: stochastic rounding may count from any number.
        state.setdefault("step", new_step(0, param, group["capturable"]))


def _plain(tensor: Tensor, param: Tensor) -> Tensor:
    """Return moments in 8 bits as float32; others as they are."""
    return _shard_like(plain(local(tensor)), param) if isinstance(local(tensor), EightBit) else tensor
