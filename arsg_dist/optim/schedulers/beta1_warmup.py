"""Warm up β1: let the first moment's averaging horizon grow."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from arsg_dist.optim.schedulers.base import GroupScheduler, beta1_of, set_beta1, torch_optimizer


class Beta1Warmup(GroupScheduler):
    """Raise β1 from `start` to each group's own, 1/(1−β1) growing linearly.

    m starts at 0 and is not bias-corrected: for β1 = 0.999 the gradients' weights in it sum to 0.095 after
    100 steps and to 0.63 after 1,000, and little more than μ·g moves the parameters at first. Warmed up from
    0.9 over 1,000 steps, they sum to 0.92 and 0.99: about 1 − (h₀/h)^(T/(H−h₀)) while the horizon h grows
    from h₀ to H in T steps. A much shorter T fills m later.

    μ stays as configured, so the observation distance η = μβ1/(1−β1) grows linearly too, from η = 9μ (for
    0.9) to its final value. The largest safe step depends on β1 only weakly (`theory.largest_safe_step`: for
    μ = 0.1 half as large at 0.9 as at 0.999). A boost's ratio does depend on β1: `ObservationBoost` takes
    that of the moment, so end the warm-up before the first boost. `ARSG.base_iterate` presumes a constant η
    and is approximate meanwhile.

    lr is not touched; chain it with torch's schedulers or step it on its own, once per iteration. β1 is a
    Python number in the group: a captured CUDA graph has to be captured anew after the warm-up, and meanwhile
    each step.

    Args:
        optimizer: `ARSG`, `RemoteObservation` (whose own β1 is warmed up, not the inner optimizer's), or another with
            `betas` in its parameter groups, configured with the final β1; may be wrapped (see `GroupScheduler`).
        warmup_steps: number of `step()` calls after which β1 has its final value, ≥ 1.
        start: β1 at first, in [0, 1). Default 0.9. A group with a final β1 below it keeps that.

    Raises:
        ValueError: an argument outside its domain; a group without `betas`; every group's β1 ≤ start; a group
            with preconditioner "adam" and bias_correction "both", which presumes a constant β1 (and makes the
            warm-up unnecessary); a group of RemoteObservation whose μ is below 1 − start.
        TypeError: the optimizer is not one of torch's.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, start: float = 0.9) -> None:
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 1:
            raise ValueError(f"warmup_steps must be an integer ≥ 1, got {warmup_steps!r}")
        if not 0.0 <= start < 1.0:
            raise ValueError(f"start must lie in [0, 1), got {start}")
        self.warmup_steps = warmup_steps
        self.start = start
        optimizer = torch_optimizer(optimizer)
        self._targets = _checked_targets(optimizer, start)
        super().__init__(optimizer)

    def beta1_at(self, step: int, target: float) -> float:
        """Return β1 after `step` calls of `step()` for a group whose final β1 is `target`."""
        if step >= self.warmup_steps or target <= self.start:
            return target
        first, last = 1 / (1 - self.start), 1 / (1 - target)
        return 1 - 1 / (first + (last - first) * step / self.warmup_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress and the groups' final β1 (not the settings)."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": self._last_lr,
            "base_lrs": self.base_lrs,
            "targets": self._targets,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved progress, with the groups' β1 that belongs to it."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        self._last_lr = list(state_dict["_last_lr"])
        self.base_lrs = list(state_dict["base_lrs"])
        self._targets = list(state_dict["targets"])
        self._set_beta1()

    def _advance(self) -> None:
        if self.last_epoch <= self.warmup_steps:  # afterwards β1 is the user's again
            self._set_beta1()

    def _set_beta1(self) -> None:
        for group, target in zip(self.optimizer.param_groups, self._targets, strict=False):
            set_beta1(group, self.beta1_at(self.last_epoch, target))


def _checked_targets(optimizer: Optimizer, start: float) -> list[float]:
    groups = optimizer.param_groups
    for index, group in enumerate(groups):
        remote = "remote_beta1" in group
        if not remote and "betas" not in group:
            raise ValueError(f"param_groups[{index}] has no 'betas': Beta1Warmup needs them")
        if (
            not remote
            and group.get("preconditioner") == "adam"
            and group.get("bias_correction", "both") == "both"
        ):
            raise ValueError(
                f"param_groups[{index}] has preconditioner='adam': its bias correction presumes a constant "
                "beta1 and makes the warm-up unnecessary; with bias_correction='second' there is none of beta1"
            )
        # As initial_lr: where the optimizer's state was loaded before, betas may be warming up already.
        target = group.setdefault("initial_beta1", beta1_of(group))
        if remote and target > start and group["remote_mu"] < (1 - start) * (1 - 1e-12):
            raise ValueError(
                f"param_groups[{index}] has remote_mu = {group['remote_mu']}, which needs a beta1 of at least "
                f"{1 - group['remote_mu']:g} from the first step on: give start={1 - group['remote_mu']:g} or more"
            )
    targets = [group["initial_beta1"] for group in groups]
    if max(targets) <= start:
        raise ValueError(f"every group's beta1 is at most start = {start}: nothing to warm up")
    return targets
