"""Raise μ once the loss flattens, and scale the learning rate to match."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from arsg_dist import theory
from arsg_dist.optim.base_iterate import UNIT
from arsg_dist.optim.schedulers.base import GroupScheduler, beta1_of, mu_name, set_value, torch_optimizer
from arsg_dist.optim.schedulers.loss_plateau import LossPlateau, LossSum

# Learning rates that torch's schedulers keep in a parameter group (OneCycleLR has all three).
_BASE_LRS_IN_GROUP = ("initial_lr", "max_lr", "min_lr")
# Learning rates that they keep in themselves (max_lrs: CyclicLR).
_BASE_LRS_IN_SCHEDULER = ("base_lrs", "max_lrs")


class ObservationBoost(GroupScheduler):
    """Multiply μ by `factor` and scale lr, at milestones or when the loss flattens.

    The paper's ARSGB: start with μ = 0.05 (and 1 to 5 times the lr that suits μ = 0.1), boost once. A boost
    sets, in each parameter group and with that group's β1 and μ, ``lr ← lr·τ_cb+(β1, μ·factor)/τ_cb+(β1, μ)``
    and ``μ ← μ·factor``; tensors are updated in place. Between boosts nothing is touched, so torch's
    schedulers run beside it: chained or in sequence, warm-up, step decay, `ReduceLROnPlateau`. Groups with μ
    = 0 have no observation to boost and stay as they are.

    Around another optimizer, `RemoteObservation`'s own μ and β1 are meant, and lr, which is the inner optimizer's and
    as much as αμ, is multiplied by τ_cb+(β1, μ·factor)/τ_cb+(β1, μ)·factor. The movement that it remembers is scaled
    as α is, so that a boost around SGD is that of RSG.

    Schedulers that compute lr from its base value on each step (`LambdaLR`, `CyclicLR`,
    `CosineAnnealingWarmRestarts`; those that `SequentialLR` starts later) would undo the scaling: name them
    in `rescale` and a boost scales their base values too, as it does the group's own `initial_lr`, `max_lr`
    and `min_lr` (`OneCycleLR`). Absolute floors (`eta_min`, `ReduceLROnPlateau`'s `min_lr`) stay.

    Plateau mode: call `record(loss)` as often as you like (each iteration), and `step()` once per observation
    (each epoch, or every so many iterations). `step` averages what was recorded since the last one, over all
    ranks, and shows it to the plateau detector. Every rank sees the same number and decides alike. In plateau
    mode `step` is a collective operation: every rank has to call it, until `max_boosts` boosts are done.

    To resume, construct it as before and load its and the optimizer's state, in any order: the optimizer's
    state has lr and μ, this one has the progress. Settings (milestones, factor, ...) are those given to the
    constructor.

    Args:
        optimizer: `RemoteObservation`, or one with `mu` and `betas` in its parameter groups, such as `ARSG`; may be
            wrapped (see `GroupScheduler`).
        milestones: the numbers of `step()` calls after which to boost: integers ≥ 1, epochs or iterations
            depending on when you call `step`.
        plateau: a `LossPlateau` that decides instead of milestones.
        factor: multiplier of μ, > 1. Default 2.
        max_boosts: with `plateau`, how often to boost at most. Default 1.
        rescale: other schedulers of this optimizer whose base learning rates to scale along; containers
            (`SequentialLR`, `ChainedScheduler`) stand for their members.
        reduce: with `plateau`, a function that sums or averages a float64 CPU tensor [sum of losses, number
            of losses] over the ranks and returns the result, e.g.
            ``lambda t: hvd.allreduce(t, name="loss")``. Default: all_reduce on torch.distributed's default
            group if that is initialised, else no reduction.

    Raises:
        ValueError: neither or both of milestones and plateau; a setting that belongs to the other mode; a
            group without `mu` or `betas`; no group with μ > 0; a μ that would reach 1.
        TypeError: the optimizer, or something in `rescale`, is not one of torch's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Iterable[int] | None = None,
        *,
        plateau: LossPlateau | None = None,
        factor: float = 2.0,
        max_boosts: int | None = None,
        rescale: Sequence[LRScheduler] = (),
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if (milestones is None) == (plateau is None):
            raise ValueError("give either milestones or plateau")
        if not factor > 1.0:
            raise ValueError(f"factor must be > 1, got {factor}")
        self.factor = factor
        self.plateau = plateau
        self.reduce = reduce
        self.boosts = 0
        """How many boosts were made."""
        if milestones is not None:
            if max_boosts is not None or reduce is not None:
                raise ValueError("max_boosts and reduce belong to plateau, not to milestones")
            self.milestones = _checked_milestones(milestones)
            self.max_boosts = len(self.milestones)
        else:
            self.milestones = ()
            self.max_boosts = 1 if max_boosts is None else max_boosts
            if (
                isinstance(self.max_boosts, bool)
                or not isinstance(self.max_boosts, int)
                or self.max_boosts < 1
            ):
                raise ValueError(f"max_boosts must be an integer ≥ 1, got {max_boosts!r}")
        self._rescaled = list(_members(rescale))
        self._losses = LossSum()
        self._last_ratios: list[float] | None = None
        optimizer = torch_optimizer(optimizer)
        _check_groups(optimizer, factor, self.max_boosts)
        super().__init__(optimizer)

    def record(self, loss: float | Tensor) -> None:
        """Add a loss to the observation that the next `step` makes (plateau mode).

        Never waits for the device. A loss that is not finite (a skipped step of mixed precision) is left out.

        Args:
            loss: this rank's loss, a number or a 1-element tensor of any dtype and device.

        Raises:
            ValueError: not a scalar.
            RuntimeError: in milestone mode, where losses play no part.
        """
        if self.plateau is None:
            raise RuntimeError("record() is for ObservationBoost(plateau=...); this one has milestones")
        if self.boosts < self.max_boosts:
            self._losses.record(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress as plain numbers and lists (tensors where lr is one)."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": self._last_lr,
            "base_lrs": self.base_lrs,
            "boosts": self.boosts,
            "last_ratios": self._last_ratios,
            "losses": self._losses.state_dict(),
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved progress; lr and μ come with the optimizer's own state.

        Raises:
            ValueError: the state was saved in the other mode (milestones or plateau).
        """
        if (state_dict["plateau"] is None) != (self.plateau is None):
            raise ValueError(
                "this state was saved with milestones instead of plateau, or the other way round"
            )
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        self._last_lr = list(state_dict["_last_lr"])
        self.base_lrs = list(state_dict["base_lrs"])
        self.boosts = state_dict["boosts"]
        self._last_ratios = state_dict["last_ratios"]
        self._losses.load_state_dict(state_dict["losses"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state_dict["plateau"])

    def _advance(self) -> None:
        if self.last_epoch == 0:
            return
        self._warn_if_undone()
        due = self.last_epoch in self.milestones if self.plateau is None else self._flattened(self.plateau)
        if due:
            self._boost()

    def _begin(self) -> None:
        self._losses.drain()
        for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=False):
            set_value(group, "lr", float(lr))

    def _flattened(self, plateau: LossPlateau) -> bool:
        if self.boosts >= self.max_boosts:
            return False
        # Reduced also where this rank recorded nothing: the others are waiting.
        total, count = (self.reduce or _sum_over_ranks)(self._losses.drain()).tolist()
        return count > 0 and plateau.observe(total / count)

    def _boost(self) -> None:
        groups = self.optimizer.param_groups
        mus = [float(group[mu_name(group)]) for group in groups]
        if max(mus) * self.factor >= 1.0:
            raise ValueError(f"mu = {max(mus)} times {self.factor} would not stay below 1")
        ratios = [
            theory.boost_ratio(beta1_of(group), mu, mu * self.factor)
            for group, mu in zip(groups, mus, strict=True)
        ]
        for index, group in enumerate(groups):
            if mu_name(group) == "remote_mu":
                group[UNIT] *= ratios[index]  # of every movement, wherever an engine keeps it
                ratios[index] *= self.factor  # lr is αμ
        for group, mu, ratio in zip(groups, mus, ratios, strict=True):
            for key in ("lr", *_BASE_LRS_IN_GROUP):
                if key in group:
                    set_value(group, key, float(group[key]) * ratio)
            set_value(group, mu_name(group), mu * self.factor)
        for scheduler in (self, *self._rescaled):
            for name in _BASE_LRS_IN_SCHEDULER:
                if hasattr(scheduler, name):
                    lrs = getattr(scheduler, name)
                    setattr(scheduler, name, [lr * ratio for lr, ratio in zip(lrs, ratios, strict=False)])
        self.boosts += 1
        self._last_ratios = ratios

    def _warn_if_undone(self) -> None:
        # A scheduler that recomputes lr from a base value we do not know brings the old lr back at one
        # stroke. Who names schedulers in `rescale` knows of this; warm restarts then raise lr legitimately.
        if self._last_ratios is None or self._rescaled:
            return
        rises = [
            float(lr) / float(last) * ratio
            for lr, last, ratio in zip(self.get_lr(), self._last_lr, self._last_ratios, strict=False)
            if ratio < 0.7 and float(last) > 0.0
        ]
        if any(0.9 < rise < 1.1 for rise in rises):
            self._last_ratios = None  # once
            warnings.warn(
                "the learning rate rose back to what it was before the observation boost: another scheduler "
                "seems to compute it from its base value; name that one in ObservationBoost(rescale=[...])",
                stacklevel=5,
            )


def _check_groups(optimizer: Optimizer, factor: float, boosts: int) -> None:
    for index, group in enumerate(optimizer.param_groups):
        if "remote_mu" not in group and ("mu" not in group or "betas" not in group):
            raise ValueError(
                f"param_groups[{index}] has no 'mu' or 'betas': ObservationBoost needs an optimizer with an "
                f"observation factor, such as ARSG or RemoteObservation, got {type(optimizer).__name__}"
            )
        # As initial_lr: where the optimizer's state was loaded before, mu may be boosted already.
        initial_mu = group.setdefault("initial_mu", float(group[mu_name(group)]))
        if initial_mu * factor**boosts >= 1.0:
            raise ValueError(
                f"param_groups[{index}]: mu = {initial_mu} times {factor} for each of {boosts} "
                "boosts would not stay below 1"
            )
    if all(group["initial_mu"] == 0.0 for group in optimizer.param_groups):
        raise ValueError("mu is 0 in every group: nothing to boost; start with mu = 0.05")


def _checked_milestones(milestones: Iterable[int]) -> tuple[int, ...]:
    checked = tuple(sorted(milestones))
    if not checked:
        raise ValueError("milestones must not be empty")
    if any(isinstance(m, bool) or not isinstance(m, int) or m < 1 for m in checked):
        raise ValueError(f"milestones must be integers ≥ 1, got {checked}")
    if len(set(checked)) < len(checked):
        raise ValueError(f"milestones must differ from each other, got {checked}")
    return checked


def _members(schedulers: Iterable[LRScheduler]) -> Iterator[LRScheduler]:
    for scheduler in schedulers:
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(f"rescale takes torch's schedulers, got {type(scheduler).__name__}")
        members = getattr(scheduler, "_schedulers", None)
        if members is None:
            yield scheduler
        else:
            yield from _members(members)


def _sum_over_ranks(totals: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return totals
    # A process group without a CPU backend (NCCL alone) reduces on this rank's device.
    on_cpu = "cpu:" in torch.distributed.get_backend_config()
    device = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
    totals = totals.to(device)
    torch.distributed.all_reduce(totals)
    return totals.cpu()
