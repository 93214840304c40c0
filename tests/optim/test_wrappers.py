"""Optimizers of others around ARSG, which read what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor

from arsg_dist import ARSG

LR, MU, BETA1 = 0.05, 0.4, 0.8


class Oracle(torch.optim.Optimizer):
    """Do in plain tensor operations what ARSG with preconditioner "none" does; count as torch's optimizers do."""

    def __init__(self, params: Any, lr: float = LR, **_: Any) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                state["step"] = state.get("step", 0) + 1
                state["exp_avg"] = BETA1 * state.get("exp_avg", torch.zeros_like(x)) + (1 - BETA1) * x.grad
                x -= group["lr"] * ((1 - MU) * state["exp_avg"] + MU * x.grad)


class StepReader(torch.optim.Optimizer):
    """Take every other gradient twice, by the inner optimizer's count, as LookSAM did before pytorch_optimizer 4.1."""

    def __init__(self, params: Any, inner: Any, **settings: Any) -> None:
        super().__init__(params, settings)
        self.base_optimizer = inner(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        states = self.base_optimizer.state
        if (next(iter(states.values()))["step"] if states else 0) % 2:
            for x in self.param_groups[0]["params"]:
                x.grad *= 2
        self.base_optimizer.step()


def sharpness_aware(name: str) -> Callable[..., Any]:
    """Makes one of pytorch_optimizer's that take a class."""

    def make(model: torch.nn.Module, inner: Any, settings: dict[str, Any]) -> Any:
        first = (model,) if name == "WSAM" else ()
        more = {"k": 3} if name == "LookSAM" else {}
        return getattr(pytorch_optimizer, name)(*first, model.parameters(), inner, **more, **settings)

    return make


def around(name: str, **more: Any) -> Callable[..., Any]:
    """Makes one of pytorch_optimizer's that take an optimizer."""

    def make(model: torch.nn.Module, inner: Any, settings: dict[str, Any]) -> Any:
        return getattr(pytorch_optimizer, name)(inner(model.parameters(), **settings), **more)

    return make


WRAPPERS: dict[str, Callable[..., Any]] = {
    **{name: sharpness_aware(name) for name in ("SAM", "LookSAM", "FriendlySAM", "WSAM")},
    "Lookahead": around("Lookahead", k=3),
    "ScheduleFreeWrapper": around("ScheduleFreeWrapper"),
    "OrthoGrad": around("OrthoGrad"),
    "TRAC": around("TRAC"),
    "reads the count": lambda model, inner, settings: StepReader(model.parameters(), inner, **settings),
}


def trained(make: Callable[..., Any], inner: Any, settings: dict[str, Any], resumed_after: int = 0) -> Tensor:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
    inputs = torch.randn(16, 4, dtype=torch.double)
    optimizer = make(model, inner, settings)
    for update in range(7):
        if resumed_after and update == resumed_after:
            saved = optimizer.state_dict()
            optimizer = make(model, inner, settings)
            optimizer.load_state_dict(saved)
        if hasattr(optimizer, "train"):
            optimizer.train()

        def loss(optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            value: Tensor = (model(inputs) - inputs[:, :1]).square().mean()
            value.backward()
            return value

        loss()
        takes_closure = "SAM" in type(optimizer).__name__ or isinstance(optimizer, StepReader)
        optimizer.step(*[loss] * takes_closure)
    return torch.cat([x.detach().flatten() for x in model.parameters()])


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_optimizer_around_ours_does_what_it_does_around_any(name: str) -> None:
    """Catches a KeyError where the inner state has no count, a count that is not that of the updates, and state that a
    wrapper and ours both mean to own."""
    settings = {
        "lr": LR, "betas": (BETA1, 0.9), "mu": MU, "preconditioner": "none",
        "count_steps": name == "reads the count",
    }  # fmt: skip
    expected = trained(WRAPPERS[name], Oracle, {"lr": LR})
    torch.testing.assert_close(trained(WRAPPERS[name], ARSG, settings), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("capturable", [False, True])
def test_steps_are_counted_for_those_who_ask(capturable: bool) -> None:
    """Catches a count that is asked for and not kept, also after a state without one, and another update."""
    plain, counted = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = ARSG([plain], capturable=capturable)
    counting = ARSG([counted], capturable=capturable)
    for update in range(5):
        for x in (plain, counted):
            x.grad = torch.full((3,), 1.0 + update)
        if update == 2:
            counting.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            counting.param_groups[0]["count_steps"] = True
        optimizer.step()
        counting.step()
    assert "step" not in optimizer.state[plain]
    assert counting.state[counted]["step"] == 3
    assert isinstance(counting.state[counted]["step"], torch.Tensor) == capturable
    assert torch.equal(plain, counted)
    assert optimizer.state[plain]["exp_avg"].equal(counting.state[counted]["exp_avg"])
