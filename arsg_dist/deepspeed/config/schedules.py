"""Build the "scheduler" section of a DeepSpeed config for ARSG.

Three kinds of `type`: DeepSpeed's own schedules, those of `torch.optim.lr_scheduler` (DeepSpeed 0.19.8 hands them its
wrapper instead of the optimizer, which they refuse), and ours: ObservationBoost and Beta1Warmup. Several at once are a
ChainedScheduler or SequentialLR whose `schedulers` are sections again. All are stepped once per weight update.
"""

import inspect
import warnings
from typing import Any, Final

import torch
from deepspeed.runtime import lr_schedules
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from arsg_dist.deepspeed.config.rules import AUTO
from arsg_dist.deepspeed.patching import Method
from arsg_dist.engine.state import restore_settings
from arsg_dist.optim import Beta1Warmup, LossPlateau, ObservationBoost
from arsg_dist.optim.by_name import OURS
from arsg_dist.optim.schedulers.base import GroupScheduler, mu_name, set_value


class DeepSpeedSchedule(GroupScheduler):
    """Put one of DeepSpeed's schedules in torch's form, to be chained and boosted.

    DeepSpeed's schedules set lr anew on each step. `base_lrs` are what this one multiplies that with, per group: 1 at
    first; an `ObservationBoost` that knows of this schedule scales them, as it does with those of torch's schedulers.

    Args:
        optimizer: an ARSG or RemoteObservation.
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
    """Boost on a plateau, stepped once per update but observing less often.

    Args:
        optimizer: an ARSG or RemoteObservation.
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
    """Reduce lr on a plateau as torch does, and insist on the metric.

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


_DEEPSPEEDS: Final = tuple(getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES)
_OURS: Final[dict[str, Any]] = {"ObservationBoost": ObservationBoost, "Beta1Warmup": Beta1Warmup}
_CONTAINERS: Final = ("ChainedScheduler", "SequentialLR")
_LR_FOR_ALL_GROUPS: Final = {
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "OneCycle": "cycle_max_lr",
    "LRRangeTest": "lr_range_test_min_lr",
}
"""The argument with which each of DeepSpeed's schedules overwrites the lr of every group."""


def check_scheduler(section: Any, source: str) -> None:
    """Refuse a scheduler section that cannot work with ARSG.

    Args:
        section: `{"type": ..., "params": {...}}`; None is fine. Values may be "auto".
        source: what messages call the config.

    Raises:
        ValueError: with the setting and the reason.
    """
    if section is None:
        return
    if not isinstance(section, dict) or not isinstance(section.get("type"), str):
        raise ValueError(f'{source}: a scheduler is {{"type": NAME, "params": {{...}}}}, not {section!r}')
    if set(section) - {"type", "params"}:
        raise ValueError(f"{source}: a scheduler has 'type' and 'params' only, not {sorted(section)}")
    name, params = section["type"], section.get("params") or {}
    if params == AUTO:
        return
    known = inspect.signature(_kind(name, source)).parameters
    allowed = [argument for argument in known if argument != "optimizer"]
    if name == "ObservationBoost":
        allowed = [a for a in allowed if a not in ("rescale", "reduce")]
        if "plateau" in params:
            allowed.append("observe_every")
    for key in params:
        if key not in allowed:
            raise ValueError(f"{source} sets {key} of the scheduler {name}, which has {sorted(allowed)}")
    if name in ("LambdaLR", "MultiplicativeLR"):
        raise ValueError(
            f"{source}: {name} needs a function, which JSON cannot hold: pass lr_scheduler=lambda optimizer: "
            f"{name}(optimizer, ...) to deepspeed.initialize"
        )
    if "cycle_momentum" in known and params.get("cycle_momentum", True) is not False:
        raise ValueError(
            f"{source}: the scheduler {name} would also cycle betas[0], between values meant for Adam or SGD (0.8 to "
            "0.95); ARSG's is 0.999, a horizon for averaging gradients that decides how far it looks ahead. Write "
            '"cycle_momentum": false to cycle lr only'
        )
    if name == "ObservationBoost":
        _check_boost(params, source)
    if name in _CONTAINERS:
        _check_members(name, params, source)


def _check_boost(params: dict[str, Any], source: str) -> None:
    plateau = params.get("plateau")
    if plateau is None:
        return
    known = list(inspect.signature(LossPlateau).parameters)
    if not isinstance(plateau, dict) or set(plateau) - set(known):
        raise ValueError(f"{source}: 'plateau' of ObservationBoost is an object with some of {known}")
    if "observe_every" not in params:
        raise ValueError(
            f"{source}: ObservationBoost with 'plateau' needs 'observe_every', the number of weight updates whose mean "
            "loss is one observation, for example the updates of an epoch"
        )


def _check_members(name: str, params: dict[str, Any], source: str) -> None:
    members = params.get("schedulers")
    if not isinstance(members, list) or not members:
        raise ValueError(f'{source}: {name} needs "schedulers", a list of {{"type": ..., "params": ...}}')
    for member in members:
        check_scheduler(member, source)
    types = [member["type"] for member in members]
    theirs = [kind for kind in types if kind in lr_schedules.VALID_LR_SCHEDULES]
    others = [kind for kind in types if kind not in _OURS and kind not in theirs]
    if theirs and (name == "SequentialLR" or len(theirs) + len(others) > 1):
        undone = (theirs[1:] + others) or name
        raise ValueError(
            f"{source}: DeepSpeed's {theirs[0]} sets lr anew on every update, which undoes {undone}: chain it with "
            "ObservationBoost or Beta1Warmup only, or use schedules of torch"
        )
    if "ReduceLROnPlateau" in types:
        raise ValueError(f"{source}: ReduceLROnPlateau needs a metric, which {name} does not hand on")


def with_schedules_for_arsg(method: Method) -> Method:
    """Wrap DeepSpeed's `_scheduler_from_config` to build schedules for ARSG here."""

    def _scheduler_from_config(engine: Any, optimizer: Any) -> Any:
        basic = engine.basic_optimizer
        if not isinstance(basic, OURS) or engine.scheduler_name() is None:
            return method(engine, optimizer)
        section = {"type": engine.scheduler_name(), "params": engine.scheduler_params() or {}}
        check_scheduler(section, "the DeepSpeed config")
        scheduler = build_scheduler(section, basic)
        boosts = [boost for boost in _flat(scheduler) if isinstance(boost, PlateauBoost)]
        if boosts:
            _let_record(engine, boosts)
        return scheduler

    return _scheduler_from_config


def build_scheduler(section: dict[str, Any], optimizer: Optimizer) -> Any:
    """Build the scheduler that a checked section describes.

    Args:
        section: `{"type": ..., "params": {...}}`.
        optimizer: whose groups it changes.

    Returns:
        A torch scheduler, or one of DeepSpeed's.

    Raises:
        ValueError: what the schedule itself refuses; one lr for groups that have different ones.
    """
    return _build(section, optimizer, siblings=None)


def _build(section: dict[str, Any], optimizer: Optimizer, siblings: list[Any] | None) -> Any:
    name, params = section["type"], dict(section.get("params") or {})
    if AUTO in [value for value in params.values() if isinstance(value, str)]:
        raise ValueError(f'"auto" in the params of the scheduler {name}, which nothing has filled in')
    kind = _kind(name, "the DeepSpeed config")
    try:
        if name in _CONTAINERS:
            return _container(kind, params, optimizer)
        if name in lr_schedules.VALID_LR_SCHEDULES:
            _refuse_one_lr_for_different_groups(name, params, optimizer)
            if siblings is not None:
                return DeepSpeedSchedule(optimizer, kind, params)
        if name == "ObservationBoost":
            # A boost scales the rest of the schedule: the others are told their new base values.
            params["rescale"] = [scheduler for scheduler in siblings or [] if scheduler is not None]
            if "plateau" in params:
                return PlateauBoost(optimizer, **params)
        return kind(optimizer, **params)
    except TypeError as error:
        raise ValueError(f"the scheduler {name} does not take {params}: {error}") from None


def _container(kind: Any, params: dict[str, Any], optimizer: Optimizer) -> Any:
    sections = params.pop("schedulers")
    members: list[Any] = [None] * len(sections)
    order = sorted(range(len(sections)), key=lambda i: sections[i]["type"] == "ObservationBoost")
    for i in order:  # boosts last: they have to know the others
        members[i] = _build(sections[i], optimizer, siblings=members)
    if kind is lr_scheduler.ChainedScheduler:
        return kind(members, optimizer=optimizer)
    return kind(optimizer, members, **params)


def _refuse_one_lr_for_different_groups(name: str, params: dict[str, Any], optimizer: Optimizer) -> None:
    argument = _LR_FOR_ALL_GROUPS.get(name)
    lrs = [float(group["lr"]) for group in optimizer.param_groups]
    if argument is None or isinstance(params.get(argument), list):
        return
    if name == "WarmupLR" and params.get(argument) is None:
        return  # each group's own
    if name == "WarmupDecayLR" and argument not in params and any(lr != 0.001 for lr in lrs):
        raise ValueError(
            f"WarmupDecayLR without {argument} trains with lr 0.001, whatever the optimizer's (here {lrs}): write it"
        )
    if len(set(lrs)) > 1:
        raise ValueError(
            f"the scheduler {name} would give all parameter groups the same lr, and they have {lrs}: write "
            f"{argument} as a list with one value per group"
        )


def _let_record(engine: Any, boosts: list[PlateauBoost]) -> None:
    """Let boosts see the loss of every backward pass."""
    backward = engine.backward

    def recording(loss: Any, *args: Any, **kwargs: Any) -> Any:
        for boost in boosts:
            boost.record(loss)
        return backward(loss, *args, **kwargs)

    engine.backward = recording


def _flat(scheduler: Any) -> list[Any]:
    members = getattr(scheduler, "_schedulers", None)
    return [scheduler] if members is None else [leaf for member in members for leaf in _flat(member)]


def _kind(name: str, source: str) -> Any:
    if name in _OURS:
        return _OURS[name]
    if name in lr_schedules.VALID_LR_SCHEDULES:
        return getattr(lr_schedules, name)
    kind = getattr(lr_scheduler, name, None)
    if name == "ReduceLROnPlateau":
        return MetricPlateau
    if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler):
        return kind
    names = ", ".join([*_OURS, *lr_schedules.VALID_LR_SCHEDULES])
    raise ValueError(
        f"{source}: the scheduler {name!r} is not known; there are {names} and the classes of torch.optim.lr_scheduler "
        f"(torch {torch.__version__})"
    )


def scheduled_settings(engine: Any) -> list[dict[str, Any]]:
    """Return what the engine's schedule sets in each group, as it is now; nothing without a schedule."""
    if engine.lr_scheduler is None:
        return []
    keys = ["lr", "initial_lr"]
    for scheduler in _flat(engine.lr_scheduler):
        if isinstance(scheduler, ObservationBoost):
            keys += ["mu", "remote_mu", "initial_mu"]
        if isinstance(scheduler, Beta1Warmup):
            keys += ["betas", "remote_beta1", "initial_beta1"]
    return [
        # Under a RemoteObservation "mu" and "betas" are the inner optimizer's, which no schedule sets.
        {
            key: group[key]
            for key in keys
            if key in group and not (key in ("mu", "betas") and "remote_mu" in group)
        }
        for group in engine.basic_optimizer.param_groups
    ]


def follow_schedule(engine: Any) -> None:
    """Give the groups what a schedule says whose state was loaded without that of the optimizer."""
    scheduler, groups = engine.lr_scheduler, engine.basic_optimizer.param_groups
    if isinstance(scheduler, _DEEPSPEEDS):
        if scheduler.last_batch_iteration >= 0:
            lr_schedules.update_lr(groups, scheduler.get_lr())
        return
    rates = getattr(scheduler, "_last_lr", None)
    if rates is not None and len(rates) == len(groups):
        for group, rate in zip(groups, rates, strict=True):
            restore_settings(group, {"lr": rate})
    for member in _flat(scheduler):
        if isinstance(member, ObservationBoost):
            for group in groups:
                restore_settings(group, {mu_name(group): group["initial_mu"] * member.factor**member.boosts})
