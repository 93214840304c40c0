"""A torch whose `LRScheduler.step` does all by itself, as 2.6's: nothing is left to `_update_lr`."""

import importlib.util
from types import ModuleType

import pytest
import torch
from torch.optim import SGD, Optimizer

from arsg_dist.optim.schedulers import base


class OlderScheduler:
    """What matters of torch 2.6's `LRScheduler`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.last_epoch, self._step_count = -1, 0
        self.step()

    def step(self, epoch: int | None = None) -> None:
        self._step_count += 1
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


@pytest.fixture
def older_base(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module once more, beside that torch."""
    monkeypatch.setattr(torch.optim.lr_scheduler, "LRScheduler", OlderScheduler)
    spec = importlib.util.spec_from_file_location("older_base", base.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_older_torch_advances_as_a_newer_one(older_base: ModuleType) -> None:
    """Catches a scheduler that never advances, one that counts a step twice, one that forgets the lr it left behind,
    and a jump that is taken."""

    class Halving(older_base.GroupScheduler):
        seen: list[tuple[int, list[float]]]

        def _advance(self) -> None:
            self.seen.append((self.last_epoch, list(self._last_lr)))
            if self.last_epoch == 2:
                self.optimizer.param_groups[0]["lr"] /= 2

        def _begin(self) -> None:
            self.optimizer.param_groups[0]["lr"] = 8.0

    Halving.seen = []
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = Halving(optimizer)
    scheduler.step()
    optimizer.param_groups[0]["lr"] = 0.6  # another scheduler's
    scheduler.step()
    assert Halving.seen == [(0, []), (1, [1.0]), (2, [1.0])]
    assert (optimizer.param_groups[0]["lr"], scheduler._last_lr, scheduler._step_count) == (0.3, [0.3], 3)
    with pytest.raises(ValueError, match="Halving cannot jump to step 5"):
        scheduler.step(5)
    assert scheduler.last_epoch == 2
    scheduler.step(0)
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch) == (8.0, 0)
