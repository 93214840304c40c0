"""Change a group's settings beside torch's schedulers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class GroupScheduler(LRScheduler):
    """A scheduler in torch's chainable form that touches a group's values only where it changes something.

    Torch's base class assigns every group's lr on every step. Here `_advance` decides what changes, so any
    other scheduler may run beside it, in any order, also inside `SequentialLR` and `ChainedScheduler`.

    Args:
        optimizer: a `torch.optim.Optimizer`, or a wrapper that has one as its attribute `optimizer`, as
            DeepSpeed's ZeRO optimizers do.

    Raises:
        TypeError: neither of the two.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(torch_optimizer(optimizer))

    def _advance(self) -> None:
        """Apply what is due at `self.last_epoch` calls of `step`, 0 on construction."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Start at step 0, when `SequentialLR` hands over to this scheduler."""
        self._advance()

    def get_lr(self) -> list[float | Tensor]:
        """Return the groups' current learning rates (copies, if they are tensors)."""
        return [_copied(group["lr"]) for group in self.optimizer.param_groups]

    if not hasattr(LRScheduler, "_update_lr"):  # an older torch, whose step() has no hook

        def step(self, epoch: int | None = None) -> None:
            """Step as a newer torch does."""
            last_epoch, last_lr = self.last_epoch, getattr(self, "_last_lr", [])
            super().step()  # counts, warns of a wrong order, and assigns each group the lr that it has
            self.last_epoch, self._last_lr = last_epoch, last_lr
            self._update_lr(epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        # Torch's hook: called by step(), and by SequentialLR with epoch 0 where it hands over.
        if epoch is None:
            self.last_epoch += 1
            self._advance()
        elif epoch == 0:
            self.last_epoch = 0
            self._begin()
        else:
            raise ValueError(
                f"{type(self).__name__} cannot jump to step {epoch}: call step() without an argument"
            )
        self._last_lr = self.get_lr()


def set_value(group: dict[str, Any], key: str, value: float) -> None:
    """Set a group's setting: in place if a tensor, where a captured graph reads it."""
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def mu_name(group: dict[str, Any]) -> str:
    """Return the key of a group's observation factor: that of `RemoteObservation` where it is one's, whatever the inner
    optimizer has, else `ARSG`'s."""
    return "remote_mu" if "remote_mu" in group else "mu"


def beta1_of(group: dict[str, Any]) -> float:
    """Return β1 of the average that looks ahead: `RemoteObservation`'s where the group is one's."""
    return float(group["remote_beta1"] if "remote_beta1" in group else group["betas"][0])


def set_beta1(group: dict[str, Any], beta1: float) -> None:
    """Set what `beta1_of` returns."""
    if "remote_beta1" in group:
        group["remote_beta1"] = beta1
    else:
        group["betas"] = (beta1, *group["betas"][1:])


def _copied(value: float | Tensor) -> float | Tensor:
    return value.clone() if isinstance(value, Tensor) else value


def torch_optimizer(optimizer: Any) -> Optimizer:
    """Return the torch optimizer in `optimizer`: itself, or its attribute `optimizer`.

    Raises:
        TypeError: neither is one.
    """
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(candidate, Optimizer):
            return candidate
    raise TypeError(
        f"expected a torch.optim.Optimizer or a wrapper with one as its attribute 'optimizer', got "
        f"{type(optimizer).__name__}; with DeepSpeed pass lr_scheduler=lambda optimizer: ... to "
        "initialize(), which calls it with the basic optimizer"
    )
