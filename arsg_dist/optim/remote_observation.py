"""Take any optimizer's gradients at a remote observation point."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from arsg_dist.optim.base_iterate import (
    MOVEMENT,
    UNIT,
    base_iterate_point,
    moved_to_base_iterate,
    refuse_at_base_iterate,
)
from arsg_dist.optim.hyperparameters import compute_dtype, number
from arsg_dist.optim.kernels.remote import Move, move_on
from arsg_dist.optim.state import local, real, shield_dtypes, unshielded

SETTINGS: Final = ("remote_mu", "remote_beta1", "remote_cautious_weight_decay")
"""Keys of the settings in a group, beside what the inner optimizer keeps."""
ABSENT: Final = {"remote_cautious_weight_decay": 0.0, UNIT: 1.0}
"""What groups have that were pickled before there was such a setting."""


class RemoteObservation(Optimizer):
    r"""Observe the gradient ahead of any optimizer's iterate, along its average movement.

    With Δ, the change that the inner optimizer makes to the parameters x from their gradient at x, its learning rate,
    momentum and weight decay included, and d, the average movement, 0 at first::

        d ← γ·d + (1−γ)·(Δ + (1−μ)·d)        γ = 1 − (1−β1)/μ
        x ← x + Δ + (1−μ)·d

    The base iterate, where the inner optimizer's steps lead, is θ = x − (1−μ)·d. Around SGD with learning rate αμ this
    is RSG, that is `ARSG(preconditioner="none", lr=α)` (whose θ lies further back, at x − μβ1/(1−β1)·d); around others
    it is known as EMA-Nesterov with β = 1−μ (arXiv 2605.25395). μ = 1 is the inner optimizer alone, bit for bit.

    The inner learning rate keeps its meaning, but the parameters move 1/μ times as far as with the inner optimizer
    alone: to begin with, give it μ times the learning rate that it is used with (and from α of ARSG or RSG: αμ).
    Momentum belongs in one place: let the inner optimizer have none (SGD momentum 0, AdamW betas[0] 0), or μ = 1 − β1.

    `param_groups` and `state` are the inner optimizer's own, so that schedulers of its lr, `zero_grad`, `GradScaler`,
    `state_dict` and engines that divide state among ranks see one optimizer. It costs one buffer per parameter, in its
    dtype or float32 for half precision, and within `step` one more copy of the parameters that have gradients.

    Args:
        optimizer: the inner optimizer, made over the parameters; it is not to be stepped by itself any more. Groups of
            its parameters may have settings of their own under the keys "remote_mu", "remote_beta1" and
            "remote_cautious_weight_decay".
        mu: observation factor μ in (0, 1], at least 1 − β1.
        beta1: decay β1 of the average in [0, 1).
        cautious_weight_decay: λ of a decay added to the inner optimizer's step, Δ ← Δ − lr·λ·x, of the elements that Δ
            does not move away from 0 (arXiv 2510.12402). In its place, not beside it: the inner weight_decay must be 0.

    Attributes:
        optimizer: the inner optimizer.

    Raises:
        TypeError: not a torch optimizer, one that wants a closure, or a setting of the wrong kind.
        ValueError: a setting out of range, an optimizer that is wrapped already, or one with differentiable=True.
    """

    _at_base_iterate = False

    def __init__(
        self,
        optimizer: Optimizer,
        mu: float = 0.1,
        beta1: float = 0.999,
        *,
        cautious_weight_decay: float = 0.0,
    ) -> None:
        _check_inner(optimizer)
        settings = _validated(
            dict(zip(SETTINGS, (mu, beta1, cautious_weight_decay), strict=True)) | {"lr": None}
        )
        for group in optimizer.param_groups:
            group.update(_validated({**settings, **group}))
            group.setdefault(UNIT, 1.0)
        self.optimizer: Optimizer = _Beginning()  # type: ignore[assignment]  # takes what torch sets at first
        super().__init__(optimizer.param_groups, {**optimizer.defaults, **settings})
        self.optimizer = optimizer

    # Not shared by reference: engines put other groups in the place of these, and mean those that `step` updates.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Parameter groups of the inner optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """State of the inner optimizer, the movements among it."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # restores the hooks' dictionaries, which are not pickled
        for group in state["optimizer"].param_groups:
            for name, absent in ABSENT.items():
                group.setdefault(name, absent)

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.optimizer!r}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the inner optimizer; see `torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: may have the keys of `SETTINGS`.

        Raises:
            RuntimeError: inside `base_iterate`.
            TypeError: a setting of the wrong kind.
            ValueError: a setting out of range, and what the inner optimizer raises.
        """
        if isinstance(self.optimizer, _Beginning):
            super().add_param_group(param_group)  # of those that the inner optimizer was made with
            return
        self._refuse_at_base_iterate("add_param_group")
        own = {name: self.defaults[name] for name in SETTINGS}
        if isinstance(param_group, dict):
            param_group.update(_validated({**self.optimizer.defaults, **own, **param_group}))
            param_group.setdefault(UNIT, 1.0)
        self.optimizer.add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` saved: the inner optimizer's state and the movement.

        A state that the inner optimizer saved alone is taken too: the movement then starts at 0, the settings are this
        one's.

        Raises:
            RuntimeError: inside `base_iterate`.
            ValueError: it does not fit the groups, or a setting of it is out of range.
        """
        self._refuse_at_base_iterate("load_state_dict")
        groups = [
            {**{name: own[name] for name in SETTINGS}, UNIT: 1.0, **loaded}
            for own, loaded in zip(self.param_groups, state_dict["param_groups"], strict=False)
        ]
        for group in groups:
            _validated(group)
        complete = {**state_dict, "param_groups": groups or state_dict["param_groups"]}
        handle = self.optimizer.register_load_state_dict_pre_hook(
            lambda _, loaded: shield_dtypes(loaded, only=MOVEMENT)
        )
        try:
            self.optimizer.load_state_dict(complete)
        finally:
            handle.remove()
        for group in self.param_groups:
            for param in group["params"]:
                if MOVEMENT in self.state.get(param, {}):
                    kept = unshielded(self.state[param][MOVEMENT])
                    self.state[param][MOVEMENT] = kept.to(device=param.device, dtype=_dtype(param))

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the inner optimizer, then move on to the next observation point.

        Args:
            closure: reevaluates the model and returns the loss; called once, before the inner optimizer's step.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients, inside `base_iterate`, or if the inner optimizer put other memory in the
                place of a parameter's.
        """
        self._refuse_at_base_iterate("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [
            [param for param in group["params"] if param.grad is not None] for group in self.param_groups
        ]
        for param in (param for params in stepped for param in params):
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"RemoteObservation does not support sparse gradients (got layout {param.grad.layout})"
                )
        moving = [(group, _tensors(params)) for group, params in zip(self.param_groups, stepped, strict=True)]
        before = [[x.clone() for x in tensors] if _acts(group) else [] for group, tensors in moving]
        self.optimizer.step()
        for (group, tensors), params, old in zip(moving, stepped, before, strict=True):
            if _acts(group) and params:
                self._require_same_memory(params, tensors)
                self._move_on(group, params, tensors, old)
        return loss

    def _require_same_memory(self, params: list[Tensor], tensors: list[Tensor]) -> None:
        if torch.compiler.is_compiling():
            return
        for now, then in zip(_tensors(params), tensors, strict=True):
            if now.data_ptr() != then.data_ptr():
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} put other memory in the place of a parameter's (as 'p.data = ...'"
                    " does), which RemoteObservation cannot follow: use an optimizer that changes parameters in place"
                )

    def _move_on(
        self, group: dict[str, Any], params: list[Tensor], tensors: list[Tensor], before: list[Tensor]
    ) -> None:
        mu, beta1, unit = group["remote_mu"], group["remote_beta1"], group[UNIT]
        decay = group["remote_cautious_weight_decay"]
        movements: list[Tensor] = []
        if mu < 1:
            for param in params:
                if MOVEMENT not in self.state[param]:
                    self.state[param][MOVEMENT] = torch.zeros_like(param, dtype=_dtype(param))
            movements = [real(local(self.state[param][MOVEMENT])) for param in params]
        # With γ = 1 − (1−β1)/μ: γ + (1−γ)(1−μ) = β1, and 1−γ is what Δ is weighted with.
        move = Move(
            beta1=beta1,
            pull=(1 - beta1) / (mu * unit),
            reach=(1 - mu) * unit,
            decay=group["lr"] * decay if decay else 0.0,
        )
        for alike in _alike(tensors):
            x, x0, d = ([many[i] for i in alike] if many else [] for many in (tensors, before, movements))
            move_on(x, x0, d, move)

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Move the parameters from x to the base iterate θ, and back on leaving.

        θ = x − (1−μ)·d. Leaving, also by an exception, restores x bit by bit; this costs one copy of the parameters.
        Parameters never stepped stay where they are. An option for evaluation, never required; cf. `ARSG.base_iterate`.

        Raises:
            RuntimeError: nested use, or `step`, `add_param_group` or `load_state_dict` inside.
        """

        def point(param: Tensor, group: dict[str, Any]) -> Tensor | None:
            held = self.state.get(param, {})
            return base_iterate_point(local(param), held, group) if MOVEMENT in held else None

        with moved_to_base_iterate(self, point):
            yield

    def _refuse_at_base_iterate(self, what: str) -> None:
        refuse_at_base_iterate(self._at_base_iterate, what)


class _Beginning:
    """Stand for the inner optimizer while torch sets groups and state to nothing."""

    param_groups: list[dict[str, Any]]
    state: Any


def _acts(group: dict[str, Any]) -> bool:
    """Say whether there is anything to do after the inner optimizer's step."""
    return bool(group["remote_mu"] < 1 or group["remote_cautious_weight_decay"] > 0)


def _alike(tensors: list[Tensor]) -> list[list[int]]:
    """Return the places of tensors of one dtype and device each."""
    places: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault((tensor.dtype, tensor.device), []).append(place)
    return list(places.values())


def _tensors(params: list[Tensor]) -> list[Tensor]:
    return [real(local(param)).detach() for param in params]


def _dtype(param: Tensor) -> torch.dtype:
    """Of a movement: as the parameter, float32 for half precision."""
    return param.dtype if param.is_complex() else compute_dtype(param.dtype)


def _check_inner(optimizer: Any) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, type) or not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"RemoteObservation goes around an optimizer made over the parameters, not {optimizer!r}: "
            "for example RemoteObservation(torch.optim.AdamW(model.parameters(), lr=1e-4))"
        )
    if isinstance(optimizer, RemoteObservation):
        raise ValueError("RemoteObservation around RemoteObservation: the optimizer is wrapped already")
    if hasattr(optimizer, "skip_synchronize"):
        raise TypeError(
            f"RemoteObservation goes inside Horovod's wrapper, not around it ({name}): "
            "DistributedOptimizer(RemoteObservation(optimizer, ...), ...), and so with ShardedOptimizer"
        )
    if any(UNIT in group for group in optimizer.param_groups):
        raise ValueError(
            f"this {name} is inside another RemoteObservation, whose settings and movements it keeps: use that one, or "
            "make the inner optimizer anew"
        )
    if (
        inspect.signature(optimizer.step).parameters.get("closure", _OPTIONAL).default
        is inspect.Parameter.empty
    ):
        raise TypeError(
            f"{name} calls a closure several times per step, between which RemoteObservation would have to move the "
            "parameters: use an optimizer whose step() needs no closure"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"{name}(differentiable=True): RemoteObservation's step is in place and not differentiable"
        )
    if any(group.get("master") == "split" for group in optimizer.param_groups):
        raise ValueError(
            f"{name}(master='split'): RemoteObservation moves the parameters themselves, not their masters: leave it "
            "out"
        )


_OPTIONAL = inspect.Parameter("closure", inspect.Parameter.KEYWORD_ONLY, default=None)


def _validated(group: dict[str, Any]) -> dict[str, float]:
    mu = number("mu of RemoteObservation", group["remote_mu"], at_most=1.0)
    beta1 = number("beta1 of RemoteObservation", group["remote_beta1"], below=1.0)
    decay = number(
        "cautious_weight_decay of RemoteObservation", group.get("remote_cautious_weight_decay", 0.0)
    )
    if decay > 0 and group.get("weight_decay"):
        raise ValueError(
            f"RemoteObservation with cautious_weight_decay = {decay} around an optimizer with weight_decay = "
            f"{group['weight_decay']}: weights would decay twice; give the inner optimizer weight_decay=0"
        )
    if decay > 0 and "lr" not in group:
        raise ValueError(
            "cautious_weight_decay of RemoteObservation follows the learning rate, and the inner optimizer has no 'lr'"
        )
    if mu < (1 - beta1) * (1 - 1e-12) or mu == 0:  # 1 − 0.95 is above 0.05 by a rounding
        least = f"mu = {mu} needs beta1 of at least {1 - mu:g}" if mu else "mu must be above 0"
        raise ValueError(
            f"RemoteObservation with mu = {mu} and beta1 = {beta1}: mu must be at least 1 - beta1; {least}"
        )
    return dict(zip(SETTINGS, (mu, beta1, decay), strict=True))
