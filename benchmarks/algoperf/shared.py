"""The functions that AlgoPerf calls, for any of this package's optimizers.

The names, arguments and results of `Submission`'s methods are those of the benchmark's specification (`algoperf.spec`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from algoperf import spec

LOWEST = 0.01
"""Of the learning rate's factor: a run that goes on after the end of its schedule still learns."""
BATCH_SIZES = {
    "criteo1tb": 262_144,
    "fastmri": 32,
    "imagenet_resnet": 1024,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "ogbg": 512,
    "wmt": 128,
    "mnist": 64,
}
"""Over all GPUs; of the eight workloads those of the benchmark's own baselines, which fit its hardware."""


class Settings(NamedTuple):
    """What every submission takes from its search space; the optimizer's own settings stand beside it there.

    Attributes:
        warmup_factor: share of the schedule in which the learning rate rises.
        schedule_length: length of the schedule, as a share of the workload's step hint.
        label_smoothing: of the training loss.
        dropout_rate: of the network; None leaves it to the workload.
        grad_clip: largest norm of the gradient; None for no clipping.
        evaluate_at: "x", the observation point, or "theta", the base iterate.
    """

    warmup_factor: float = 0.05
    schedule_length: float = 1.0
    label_smoothing: float = 0.0
    dropout_rate: float | None = None
    grad_clip: float | None = 1.0
    evaluate_at: str = "x"


class WarmupCosine:
    """Factor on the learning rate: a linear rise, then half a cosine down to `LOWEST`, which stays.

    Args:
        warmup: updates in which it rises to 1.
        total: updates after which it has come down.
    """

    def __init__(self, warmup: int, total: int) -> None:
        self.warmup = warmup
        self.total = max(total, warmup + 1)

    def __call__(self, update: int) -> float:
        """Return the factor of an update, counted from 0."""
        if update < self.warmup:
            return (update + 1) / self.warmup
        done = min(1.0, (update - self.warmup) / (self.total - self.warmup))
        return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * done))


class EvaluationPoint:
    """Keeps x while the parameters are at θ to be evaluated.

    The benchmark evaluates the parameters, and saves them, after `prepare_for_eval`; so x is part of what is saved.

    Args:
        optimizer: with a `base_iterate`.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._x: list[Tensor] | None = None

    def _parameters(self) -> Iterator[Tensor]:
        return (param for group in self._optimizer.param_groups for param in group["params"])

    @torch.no_grad()
    def leave_x(self) -> None:
        """Move the parameters to θ, if they are not there."""
        if self._x is None:
            with self._optimizer.base_iterate():
                theta = [param.detach().clone() for param in self._parameters()]
            self._x = [param.detach().clone() for param in self._parameters()]
            self._fill(theta)

    @torch.no_grad()
    def return_to_x(self) -> None:
        """Move the parameters back, if they have left."""
        if self._x is not None:
            self._fill(self._x)
            self._x = None

    def _fill(self, values: Iterable[Tensor]) -> None:
        for param, value in zip(self._parameters(), values, strict=True):
            param.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return x, or None for parameters that are there."""
        return {"x": self._x}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take x as it was saved; the parameters that were saved with it are those at θ."""
        self._x = state["x"]


class Submission:
    """An optimizer as AlgoPerf wants it.

    Args:
        make: makes the optimizer from the parameters and the hyperparameters.
        defaults: the hyperparameters under the self-tuning ruleset, which gives none: one setting for all workloads.
    """

    def __init__(self, make: Callable[[Iterable[nn.Parameter], Any], Optimizer], defaults: Any) -> None:
        self._make = make
        self._defaults = defaults

    def _settings(self, hyperparameters: Any) -> Settings:
        given = hyperparameters or self._defaults
        return Settings(**{name: getattr(given, name) for name in Settings._fields if hasattr(given, name)})

    def init_optimizer_state(
        self,
        workload: Any,
        model_params: nn.Module,
        model_state: Any,
        hyperparameters: Any,
        rng: Any,
    ) -> dict[str, Any]:
        """Return the optimizer, its schedule and the point of evaluation; all have a `state_dict`, so all are saved."""
        settings = self._settings(hyperparameters)
        optimizer = self._make(model_params.parameters(), hyperparameters or self._defaults)
        total = max(1, round(settings.schedule_length * workload.step_hint))
        return {
            "optimizer": optimizer,
            "scheduler": LambdaLR(optimizer, WarmupCosine(round(settings.warmup_factor * total), total)),
            "evaluation": EvaluationPoint(optimizer),
        }

    def update_params(
        self,
        workload: Any,
        current_param_container: nn.Module,
        current_params_types: Any,
        model_state: Any,
        hyperparameters: Any,
        batch: dict[str, Tensor],
        loss_type: Any,
        optimizer_state: dict[str, Any],
        eval_results: list[tuple[int, float]],
        global_step: int,
        rng: Any,
        train_state: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], nn.Module, Any]:
        """Make one update from one batch; under DDP the same on all ranks, bit for bit."""
        settings, model = self._settings(hyperparameters), current_param_container
        optimizer = optimizer_state["optimizer"]
        optimizer_state["evaluation"].return_to_x()
        model.train()
        optimizer.zero_grad(set_to_none=True)
        dropout = {} if settings.dropout_rate is None else {"dropout_rate": settings.dropout_rate}
        logits, model_state = workload.model_fn(
            params=model,
            augmented_and_preprocessed_input_batch=batch,
            model_state=model_state,
            mode=spec.ForwardPassMode.TRAIN,
            rng=rng,
            update_batch_norm=True,
            **dropout,
        )
        losses = workload.loss_fn(
            label_batch=batch["targets"],
            logits_batch=logits,
            mask_batch=batch.get("weights"),
            label_smoothing=settings.label_smoothing,
        )
        # The mean over the valid examples of all ranks: how many there are differs from rank to rank (padded speech,
        # masked labels), and DDP takes the mean of the ranks' gradients.
        valid = torch.as_tensor(losses["n_valid_examples"], device=losses["summed"].device).detach().clone()
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(valid)
            ranks = dist.get_world_size()
        (losses["summed"] * ranks / valid).backward()
        if settings.grad_clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=settings.grad_clip)
            if workload.metrics_logger is not None and (global_step <= 100 or global_step % 500 == 0):
                workload.metrics_logger.append_scalar_metrics({"grad_norm": norm.item()}, global_step)
        optimizer.step()
        optimizer_state["scheduler"].step()
        return optimizer_state, model, model_state

    def prepare_for_eval(
        self,
        workload: Any,
        current_param_container: nn.Module,
        current_params_types: Any,
        model_state: Any,
        hyperparameters: Any,
        loss_type: Any,
        optimizer_state: dict[str, Any],
        eval_results: list[tuple[int, float]],
        global_step: int,
        rng: Any,
    ) -> tuple[dict[str, Any], nn.Module, Any]:
        """Move the parameters to θ where that is to be evaluated; the next update moves them back."""
        if self._settings(hyperparameters).evaluate_at == "theta":
            optimizer_state["evaluation"].leave_x()
        return optimizer_state, current_param_container, model_state

    def data_selection(
        self,
        workload: Any,
        input_queue: Iterator[dict[str, Any]],
        optimizer_state: dict[str, Any],
        current_param_container: nn.Module,
        model_state: Any,
        hyperparameters: Any,
        global_step: int,
        rng: Any,
    ) -> dict[str, Tensor]:
        """Take the next batch."""
        return next(input_queue)

    def get_batch_size(self, workload_name: str) -> int:
        """Return the images, sentences, ... per update over all GPUs.

        Raises:
            ValueError: for a variant of a workload; the benchmark then asks for the workload itself.
        """
        if workload_name not in BATCH_SIZES:
            raise ValueError(
                f"no batch size for the workload {workload_name!r}; there is {', '.join(BATCH_SIZES)}"
            )
        return BATCH_SIZES[workload_name]
