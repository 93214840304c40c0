"""Loss scaling and clipping inside the update: what torch's GradScaler, and a program that clips, ask of `step`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arsg_dist import ARSG
from arsg_dist.optim import arsg
from tests.optim.optim_paths import ALL_PATHS, MODES, Path, gradients, parameters, run

SHAPES = [(3, 4), (5,), ()]


def stepped(
    path: Path, mode: str, scale: float | None, found_inf: float | None = None, **more: Any
) -> tuple[ARSG, list[torch.Tensor]]:
    """An optimizer after two steps, of which the second was scaled."""
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = ARSG(params, preconditioner=mode, weight_decay=0.1, **path.settings, **more)
    first, second = gradients(SHAPES, 2, dtype=torch.float32)
    run(optimizer, params, [first])
    if scale is not None:
        optimizer.grad_scale = torch.tensor(scale)
    if found_inf is not None:
        optimizer.found_inf = torch.tensor(found_inf)
    run(optimizer, params, [[grad * (scale or 1.0) for grad in second]])
    return optimizer, params


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_a_scaled_gradient_makes_the_same_update_and_is_left_as_it_is(path: Path, mode: str) -> None:
    """Catches a scale that is forgotten, applied twice or to the decay, and gradients that are changed."""
    _, params = stepped(path, mode, 1024.0, 0.0)
    _, expected = stepped(path, mode, None)
    for x, y in zip(params, expected, strict=True):
        assert torch.equal(x, y)
    for x, grad in zip(params, gradients(SHAPES, 2, dtype=torch.float32)[1], strict=True):
        assert torch.equal(x.grad, 1024 * grad)
    clipped = stepped(path, mode, 3.7)[1]
    for x, y in zip(clipped, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ALL_PATHS)
def test_an_overflow_changes_nothing(path: Path, mode: str) -> None:
    """Catches a step that counts though it was left out, and moments or weights that keep what overflowed."""
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = ARSG(params, preconditioner=mode, **path.settings)
    first, second = gradients(SHAPES, 2, dtype=torch.float32)
    run(optimizer, params, [first])
    before = [x.detach().clone() for x in params]
    states = [
        {name: torch.as_tensor(value).clone() for name, value in optimizer.state[x].items()} for x in params
    ]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    run(optimizer, params, [[torch.full_like(grad, float("inf")) for grad in second]])
    for x, y, state in zip(params, before, states, strict=True):
        assert torch.equal(x, y)
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(optimizer.state[x][name]), value), name


def test_torchs_scaler_hands_its_scale_over() -> None:
    """Catches a scaler that goes over all gradients itself, and one whose overflow is not left out or not answered."""
    params, expected = (parameters(SHAPES, dtype=torch.float32) for _ in range(2))
    optimizer, plain = ARSG(params, 0.1), ARSG(expected, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    grads = gradients(SHAPES, 3, dtype=torch.float32)
    for number, step_grads in enumerate(grads):
        loss = scaler.scale(sum((x * grad).sum() for x, grad in zip(params, step_grads, strict=True)))
        loss.backward()
        if number == 1:
            params[1].grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "found_inf")
        if number != 1:
            assert torch.equal(params[0].grad, (256.0 if number == 0 else 128.0) * step_grads[0])
        optimizer.zero_grad()
    assert scaler.get_scale() == 128.0
    run(plain, expected, [grads[0], grads[2]])
    for x, y in zip(params, expected, strict=True):
        assert torch.equal(x, y)


def test_the_host_asks_for_an_overflow_where_it_counts_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a count that goes on over steps that the device left out."""
    monkeypatch.setattr(arsg, "step_function", lambda *_: arsg.fused_step)
    monkeypatch.setattr(arsg, "has_triton", lambda: True)

    def group_of(cuda: bool = True, **settings: Any) -> dict[str, Any]:
        x = torch.nn.Parameter(torch.ones(2))
        (group,) = ARSG([x], betas=(0.9, 0.9), **settings).param_groups
        stand_in = type("OnGpu", (torch.Tensor,), {"is_cuda": cuda})(torch.ones(2))
        stand_in.grad = torch.ones(2)
        group["params"] = [stand_in]
        return group

    assert arsg._skips_on_device(group_of())
    assert arsg._skips_on_device(group_of(preconditioner="adam", capturable=True))
    for group in (
        group_of(cuda=False),
        group_of(preconditioner="adam"),
        group_of(state_dtype="bfloat16"),
        group_of(lookahead_k=2),
        group_of(lookahead_k=2, capturable=True),
    ):
        assert not arsg._skips_on_device(group)


def test_a_count_on_the_device_leaves_out_what_the_device_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bias corrections that go on over updates that were not made."""
    asked: list[Any] = []
    monkeypatch.setattr(arsg, "_skips_on_device", lambda _: True)
    monkeypatch.setattr(arsg, "step_function", lambda *_: lambda *_, hyper, **__: asked.append(hyper))
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = ARSG(params, preconditioner="adam", capturable=True)
    steps = gradients(SHAPES, 3, dtype=torch.float32)
    for step_grads, found_inf in zip(steps, (0.0, 1.0, 0.0), strict=True):
        optimizer.found_inf = torch.tensor(found_inf)
        run(optimizer, params, [step_grads])
    assert [float(hyper.found_inf) for hyper in asked] == [0.0, 1.0, 0.0]
    assert [float(optimizer.state[x]["step"]) for x in params] == [2.0, 2.0, 2.0]
