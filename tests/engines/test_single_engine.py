"""The engine of one process against updates worked out by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import EngineState, JobError, SingleProcessEngine, state


class Slopes(nn.Module):
    """Two parameters whose gradients are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Parameter(torch.ones(2)) for _ in range(2))

    def forward(self, first: float, last: float) -> torch.Tensor:
        return first * self.first.sum() + last * self.last.sum()

    def values(self) -> list[float]:
        return [*self.first.tolist(), *self.last.tolist()]


def made(groups: int = 1, **settings: Any) -> SingleProcessEngine:
    module = Slopes()
    optimizer = torch.optim.SGD(
        [{"params": [module.first, module.last]}]
        if groups == 1
        else [{"params": [module.first]}, {"params": [module.last], "lr": 0.2}],
        lr=0.1,
    )
    return SingleProcessEngine(module, optimizer, **settings)


def go(engine: SingleProcessEngine, *inputs: tuple[float, float]) -> list[float]:
    for values in inputs:
        engine.backward(engine.module(*values))
        engine.step()
    return engine.module.values()  # type: ignore[operator, no-any-return]


def saved(engine: SingleProcessEngine, directory: Path) -> SavedRun:
    store = CheckpointStore(directory, engine.communicator)
    return SavedRun(save_run(store, 1, engine.state(), {}, engine.communicator))


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_an_update_is_of_the_mean_over_its_micro_batches(loss_scaling: bool) -> None:
    """Catches a sum in place of the mean, a micro-batch that counts in two updates, and an update made too soon."""
    engine = made(accumulation_steps=3, loss_scaling=loss_scaling)
    assert go(engine, (1.0, 3.0), (2.0, 3.0)) == [1.0] * 4
    assert go(engine, (6.0, 3.0)) == pytest.approx([0.7] * 4)
    assert go(engine, (3.0, 0.0), (0.0, 0.0)) == pytest.approx([0.7] * 4)
    assert go(engine, (0.0, 3.0)) == pytest.approx([0.6] * 4)


def test_the_mean_gradient_is_clipped_not_its_parts() -> None:
    """Catches clipping before the last micro-batch, or of the sum."""
    engine = made(accumulation_steps=2, clip_grad_norm=1.0)
    assert go(engine, (4.0, 0.0), (-3.0, 0.0)) == pytest.approx([1 - 0.05, 1 - 0.05, 1.0, 1.0], abs=1e-6)
    # The mean is (0.5, 0.5) in the first: of norm √½, so it stays. Here it is (3, 3, 4, 4), of norm √50.
    shrunk = 0.1 / 50**0.5
    expected = [0.95 - 3 * shrunk] * 2 + [1 - 4 * shrunk] * 2
    assert go(engine, (6.0, 0.0), (0.0, 8.0)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_bad_parameter_leaves_the_update_out_and_nothing_behind(bad: float, place: str) -> None:
    """Catches a look at the first parameter only, an update that is not counted, and a gradient that stays for the
    next one."""
    engine = made(skip_nonfinite=True)
    assert go(engine, (bad, 1.0) if place == "first" else (1.0, bad)) == [1.0] * 4
    assert engine.skipped_updates == 1
    assert go(engine, (1.0, 2.0)) == pytest.approx([0.9, 0.9, 0.8, 0.8])
    assert engine.skipped_updates == 1


def test_a_resumed_loss_scale_grows_when_it_would_have(tmp_path: Path) -> None:
    """Catches a count of good updates that starts anew after a resume, and one that is taken from another engine."""

    def engine() -> SingleProcessEngine:
        one = made(loss_scaling=True)
        one._grad_scaler.set_growth_interval(3)
        return one

    first = engine()
    go(first, (float("inf"), 0.0), (1.0, 1.0), (1.0, 1.0))
    assert first._grad_scaler.get_scale() == 32768
    run, second = saved(first, tmp_path), engine()
    second.load_state(run)
    go(second, (1.0, 1.0))
    assert second._grad_scaler.get_scale() == 65536
    assert run.loss_scale is not None
    run.loss_scale = {"kind": "another engine", "scale": 128.0, "cur_iter": 7}
    third = engine()
    third.load_state(run)
    go(third, (1.0, 1.0))
    assert third._grad_scaler.get_scale() == 128


def test_groups_that_do_not_fit_are_refused_before_anything_changes(tmp_path: Path) -> None:
    """Catches the first group's settings given to the second one's parameters, and weights that are loaded all the
    same."""
    run, engine = saved(made(groups=2), tmp_path), made()
    weights = go(engine, (1.0, 1.0))
    with pytest.raises(JobError, match=r"of groups \[0, 1\] of .*, whose settings differ"):
        engine.load_state(run)
    assert engine.module.values() == weights  # type: ignore[operator]


def test_after_a_load_every_group_goes_on_with_its_own_settings_and_state(tmp_path: Path) -> None:
    """Catches a second group with the first one's learning rate or moments: seen only by the next update."""

    def engine() -> SingleProcessEngine:
        module = Slopes()
        groups = [{"params": [module.first]}, {"params": [module.last], "lr": 0.5, "betas": (0.5, 0.5)}]
        return SingleProcessEngine(module, ARSG(groups, lr=0.1, betas=(0.9, 0.5), mu=0.5, eps=1e-4))

    first = engine()
    go(first, (1.0, 2.0))
    second = engine()
    for group in second.optimizer.param_groups:
        group["lr"] = 9.0
    second.load_state(saved(first, tmp_path))
    # α, m and v̂ of each: x = 1 − α·(μ·m + (1 − μ)·g)/√v̂ of the first update, and again of g = 0.
    expected = []
    for lr, beta1, gradient in ((0.1, 0.9, 1.0), (0.5, 0.5, 2.0)):
        m, v = (1 - beta1) * gradient, 0.5 * gradient**2
        x = 1 - lr * (0.5 * m + 0.5 * gradient) / v**0.5
        expected += [x - lr * 0.5 * beta1 * m / v**0.5] * 2
    assert go(second, (0.0, 0.0)) == pytest.approx(expected, rel=1e-5)


def test_the_parts_of_a_large_tensor_are_its_consecutive_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second part that holds the first one's elements, in a tensor or in a rank's share of it."""
    monkeypatch.setattr(state, "_PIECE_NUMEL", 3)
    tensor = torch.arange(20.0)
    for rank, share in ((0, tensor[:10]), (1, tensor[10:])):
        offered = EngineState("single")
        offered.add_replicated({"parameter:w": tensor}, rank, 2)
        assert [piece.numel for piece in offered.pieces] == [3, 3, 3, 1]
        assert [piece.start for piece in offered.pieces] == [10 * rank + 3 * number for number in range(4)]
        assert torch.equal(torch.cat([piece.values() for piece in offered.pieces]), share)
