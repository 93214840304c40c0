"""What a submission sees of AlgoPerf: its own package where that is installed, else what stands in for it.

Names, arguments and order are those of `algoperf.spec` (mlcommons/algorithmic-efficiency, September 2025).
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
import types
from collections import namedtuple
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

STATE = ("workload", "current_param_container", "current_params_types", "model_state", "hyperparameters")
AFTER = ("loss_type", "optimizer_state", "eval_results", "global_step", "rng")
ARGUMENTS = {
    "init_optimizer_state": ("workload", "model_params", "model_state", "hyperparameters", "rng"),
    "update_params": (*STATE, "batch", *AFTER, "train_state"),
    "prepare_for_eval": (*STATE, *AFTER),
    "data_selection": (
        "workload",
        "input_queue",
        "optimizer_state",
        "current_param_container",
        "model_state",
        "hyperparameters",
        "global_step",
        "rng",
    ),
    "get_batch_size": ("workload_name",),
}


def submission(name: str) -> Any:
    """Return the module of a submission, with something for it to import."""
    if "algoperf" not in sys.modules and importlib.util.find_spec("algoperf") is None:
        spec = types.ModuleType("algoperf.spec")
        spec.ForwardPassMode = enum.Enum("ForwardPassMode", {"TRAIN": 0, "EVAL": 1})  # type: ignore[attr-defined]
        package = types.ModuleType("algoperf")
        package.spec = spec  # type: ignore[attr-defined]
        sys.modules |= {"algoperf": package, "algoperf.spec": spec}
    return importlib.import_module(f"benchmarks.algoperf.{name}.submission")


def point(**values: Any) -> Any:
    """Return hyperparameters as the benchmark hands them over."""
    return namedtuple("Hyperparameters", values)(**values)


class Workload:
    """A small network with batch norm and dropout, some of whose examples do not count."""

    step_hint = 20
    loss_type = "SOFTMAX_CROSS_ENTROPY"
    model_params_types = None
    metrics_logger = None

    def __init__(self) -> None:
        self.dropout_rates: list[float] = []

    def init_model_fn(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: dict[str, Tensor],
        model_state: Any,
        mode: Any,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float = 0.5,
    ) -> tuple[Tensor, Any]:
        assert mode.name == "TRAIN"
        assert update_batch_norm
        assert params.training
        self.dropout_rates.append(dropout_rate)
        return params(augmented_and_preprocessed_input_batch["inputs"]), model_state

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        losses = functional.cross_entropy(
            logits_batch, label_batch, reduction="none", label_smoothing=label_smoothing
        )
        mask = torch.ones_like(losses) if mask_batch is None else mask_batch
        return {"summed": (losses * mask).sum(), "n_valid_examples": mask.sum(), "per_example": losses}


def batch_of(step: int) -> dict[str, Tensor]:
    """Return 8 examples, of which the first half has 4 that count and the second half 2."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 1])
    return {
        "inputs": torch.randn(8, 4, generator=generator),
        "targets": torch.randint(3, (8,), generator=generator),
        "weights": weights,
    }


def run(
    module: Any, workload: Any, model: nn.Module, state: Any, given: Any, step: int, batch: Any
) -> dict[str, Any]:
    """Make one update the way the benchmark's runner does; return the optimizer's state."""
    taken = module.data_selection(workload, iter([batch]), state, model, None, given, step, None)
    state, same, _ = module.update_params(
        workload=workload,
        current_param_container=model,
        current_params_types=workload.model_params_types,
        model_state=None,
        hyperparameters=given,
        batch=taken,
        loss_type=workload.loss_type,
        optimizer_state=state,
        eval_results=[],
        global_step=step,
        rng=None,
        train_state=types.MappingProxyType({"accumulated_submission_time": 0}),
    )
    assert same is model
    return state


def prepare(module: Any, workload: Any, model: nn.Module, state: Any, given: Any, step: int) -> None:
    """Prepare an evaluation the way the runner does."""
    module.prepare_for_eval(
        workload=workload,
        current_param_container=model,
        current_params_types=workload.model_params_types,
        model_state=None,
        hyperparameters=given,
        loss_type=workload.loss_type,
        optimizer_state=state,
        eval_results=[],
        global_step=step,
        rng=None,
    )
