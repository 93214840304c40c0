"""Schedules as DeepSpeed's step needs them, for engines whose optimizer is an ARSG."""

import warnings
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from arsg_dist.optim import LossPlateau, ObservationBoost
from arsg_dist.optim.schedulers.base import GroupScheduler, set_value


class DeepSpeedSchedule(GroupScheduler):
    """One of DeepSpeed's own schedules in torch's form, so that it can be chained and boosted.

    DeepSpeed's schedules set lr anew on each step. `base_lrs` are what this one multiplies that with, per group: 1 at
    first; an `ObservationBoost` that knows of this schedule scales them, as it does with those of torch's schedulers.

    Args:
        optimizer: an ARSG.
        kind: a class of `deepspeed.runtime.lr_schedules`.
        params: its arguments.
    """

    def __init__(self, optimizer: Optimizer, kind: type, params: dict[str, Any]) -> None:
        super().__init__(optimizer)  # before the inner one changes lr, which becomes each group's initial_lr
        self.inner = kind(optimizer, **params)
        self.base_lrs = [1.0] * len(optimizer.param_groups)
        self._last_lr = self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Return the progress as plain numbers and lists."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": self._last_lr,
            "base_lrs": self.base_lrs,
            "inner": self.inner.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved progress; lr itself comes with the optimizer's state."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        self._last_lr = list(state_dict["_last_lr"])
        self.base_lrs = list(state_dict["base_lrs"])
        self.inner.load_state_dict(state_dict["inner"])

    def _advance(self) -> None:
        if self.last_epoch == 0:  # on construction: the inner one has set the first lr
            return
        self.inner.step()
        for group, scale in zip(self.optimizer.param_groups, self.base_lrs, strict=False):
            set_value(group, "lr", float(group["lr"]) * float(scale))


class PlateauBoost(ObservationBoost):
    """An `ObservationBoost` in plateau mode that is stepped once per update but observes less often.

    Args:
        optimizer: an ARSG.
        plateau: the arguments of a `LossPlateau`.
        observe_every: updates per observation, ≥ 1: the mean of their losses is one observation.
        settings: of `ObservationBoost`: factor, max_boosts, rescale.

    Raises:
        ValueError: a setting out of range.
        TypeError: a setting of the wrong kind.
    """

    def __init__(
        self, optimizer: Optimizer, plateau: dict[str, Any], observe_every: int, **settings: Any
    ) -> None:
        if isinstance(observe_every, bool) or not isinstance(observe_every, int) or observe_every < 1:
            raise ValueError(f"observe_every must be an integer ≥ 1, got {observe_every!r}")
        self.observe_every = observe_every
        super().__init__(optimizer, plateau=LossPlateau(**plateau), **settings)

    def _flattened(self, plateau: LossPlateau) -> bool:
        if self.last_epoch % self.observe_every:
            return False
        if self.boosts < self.max_boosts and self._losses.state_dict()[1] == 0:
            warnings.warn(
                f"no finite loss was seen in {self.observe_every} updates, so the observation boost cannot tell "
                "whether the loss flattens: call engine.backward(loss), or engine.lr_scheduler.record(loss)",
                stacklevel=2,
            )
        return super()._flattened(plateau)


class MetricPlateau(ReduceLROnPlateau):
    """Torch's `ReduceLROnPlateau`, which insists on the metric.

    DeepSpeed calls `step()`, and when that raises TypeError for lack of the metric `step(train_batch_size)`: the batch
    size, of all things, would be the loss that never falls.
    """

    def step(self, metrics: Any = None, epoch: int | None = None) -> None:  # type: ignore[override]
        """Take in the metric of one update.

        Raises:
            ValueError: no metric.
        """
        if metrics is None:
            raise ValueError(
                "ReduceLROnPlateau needs a metric on every update: engine.step(lr_kwargs={'metrics': loss}); for a "
                "schedule that sees the training loss by itself use ObservationBoost with 'plateau'"
            )
        super().step(metrics, epoch)
