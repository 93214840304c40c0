"""DeepSpeed's ZeRO engine behind the common `Engine` interface."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from arsg_dist.deepspeed.base_iterate import base_iterate
from arsg_dist.deepspeed.engine_state import COUNTERS, engine_state
from arsg_dist.deepspeed.load_saved import check_saved, fill, publish
from arsg_dist.deepspeed.shared_memory import release_shared_memory
from arsg_dist.engine import (
    Capabilities,
    Communicator,
    Engine,
    EngineState,
    Ranks,
    SavedState,
    TorchCommunicator,
    all_finite,
    announce_to_torch,
    collective_timeout,
    copy_weights,
    init_method,
)


def connect(ranks: Ranks) -> Communicator:
    """Joins this process to the job under DeepSpeed and returns its communicator.

    Args:
        ranks: from `discover_ranks`.

    Raises:
        ValueError: no launcher announced the ranks, or the job came up with another number of ranks.
    """
    if ranks.launcher in ("none", "horovodrun"):
        raise ValueError(
            "this process was not started by the deepspeed launcher, torchrun, srun or mpirun: "
            "start it with 'deepspeed SCRIPT ...', without GPUs 'deepspeed --num_accelerators 2 SCRIPT ...'"
        )
    announce_to_torch(ranks)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    timeout = collective_timeout()
    options = {"timeout": timeout} if timeout else {}
    deepspeed.init_distributed(verbose=False, init_method=init_method(), **options)
    communicator = TorchCommunicator(_device(ranks))
    if communicator.world_size != ranks.world_size:
        raise ValueError(
            f"the launcher announced {ranks.world_size} ranks but {communicator.world_size} came up"
        )
    release_shared_memory()
    return communicator


def capabilities_at(stage: int) -> Capabilities:
    """What code above an engine may count on at a ZeRO stage."""
    if stage < 3:
        return Capabilities()
    return Capabilities(
        no_whole_weights="ZeRO stage 3, under which no rank holds the whole weights: "
        "use a DeepSpeed config with stage 0, 1 or 2"
    )


def _device(ranks: Ranks) -> torch.device:
    return torch.device(get_accelerator().device_name(ranks.local_rank))


class DeepSpeedEngine(Engine):
    """A model under DeepSpeed, its optimizer state sharded by the ZeRO stage of the config.

    Args:
        module: the model; DeepSpeed moves it to this rank's device and casts it as the config says.
        config: a complete DeepSpeed config (`resolve_config` makes one).
        communicator: from `connect`.
        parameter_groups: as torch optimizers take them; default one group of all trainable parameters.
        optimizer: makes the optimizer from these groups, in place of the config's optimizer section, which DeepSpeed
            reads in its own way ("Adam" is AdamW there). Default: what the section says.
        skip_nonfinite: leave out updates whose gradient is not finite; DeepSpeed does in any case, but at stage 0 in
            fp32.
    """

    kind = "deepspeed"

    def __init__(
        self,
        module: nn.Module,
        config: dict[str, Any],
        communicator: Communicator,
        *,
        parameter_groups: list[dict[str, Any]] | None = None,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        groups = parameter_groups or [{"params": [p for p in module.parameters() if p.requires_grad]}]
        if optimizer is not None:
            config = {key: value for key, value in config.items() if key != "optimizer"}
            config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        self.engine, *_ = deepspeed.initialize(
            model=module, model_parameters=groups, optimizer=optimizer, config=config
        )
        self.communicator = communicator
        self.module = self.engine
        # The ZeRO wrapper is no torch Optimizer, which schedulers insist on; the inner one shares its groups.
        self.optimizer = self.engine.basic_optimizer
        self.accumulation_steps = self.engine.gradient_accumulation_steps()
        self.device = self.engine.device
        if self.engine.bfloat16_enabled():
            self.input_dtype = torch.bfloat16
        elif self.engine.fp16_enabled():
            self.input_dtype = torch.float16
        self.loss_scaling = self.engine.fp16_enabled()
        self.capabilities = capabilities_at(self.engine.zero_optimization_stage())
        self._skip_nonfinite = skip_nonfinite and not self.loss_scaling
        if self._skip_nonfinite and hasattr(self.engine.optimizer, "check_grad_overflow"):
            self.engine.optimizer.check_grad_overflow = (
                True  # off in fp32, where DeepSpeed expects no overflow
            )

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient; DeepSpeed divides by the number of micro-batches and averages over the ranks."""
        self.engine.backward(loss)

    def step(self) -> None:
        """Ends a micro-batch; DeepSpeed updates the weights after the last one."""
        before = self.engine.skipped_steps
        if self._skip_nonfinite and self.engine.optimizer is self.engine.basic_optimizer:
            self._leave_out_nonfinite()
        self.engine.step()
        self.skipped_updates += self.engine.skipped_steps - before

    def _leave_out_nonfinite(self) -> None:
        """Stage 0 in fp32 has no check of its own; without gradients its step changes nothing."""
        if not self.engine.is_gradient_accumulation_boundary():
            return
        if not all_finite(p.grad for p in self.engine.module.parameters() if p.grad is not None):
            self.engine.module.zero_grad(set_to_none=True)
            self.skipped_updates += 1

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Gather the model's state dict, under ZeRO stage 3 from all ranks."""
        parts = [p for p in self.engine.module.parameters() if hasattr(p, "ds_id")]
        gathered = deepspeed.zero.GatheredParameters(parts) if parts else nullcontext()
        with gathered:
            return copy_weights(self.engine.module) if self.communicator.rank == 0 else {}

    def local_parameters(self) -> Iterator[torch.Tensor]:
        """Yield the parameters, under ZeRO stage 3 this rank's parts."""
        for parameter in self.engine.module.parameters():
            yield getattr(parameter, "ds_tensor", parameter)

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters, at stages 0 to 2."""
        if self.capabilities.no_whole_weights:
            raise NotImplementedError("under ZeRO stage 3 no rank holds whole weights to compare")
        yield from self.engine.module.named_parameters()

    def state(self) -> EngineState:
        """This rank's shards; of what every rank holds alike, its share."""
        self._refuse_at_base_iterate("state")
        return engine_state(self.engine, self.communicator.rank, self.communicator.world_size)

    def load_state(self, saved: SavedState) -> None:
        """Every rank reads the pieces it holds, under any stage."""
        self._refuse_at_base_iterate("load_state")
        with self.communicator.fail_together():
            check_saved(self.engine, saved, with_optimizer=True)
        with self.communicator.fail_together():
            fill(self.engine, saved, with_optimizer=True)
        publish(self.engine)
        for name in COUNTERS:
            setattr(self.engine, name, saved.counters.get(name, 0))
        # From here on updates may have another number of micro-batches.
        self.engine.micro_steps = self.engine.global_steps * self.accumulation_steps

    def base_iterate(self) -> AbstractContextManager[None]:
        """Moves the parameters to θ and back; see `arsg_dist.deepspeed.base_iterate`."""
        return base_iterate(self.engine)

    @property
    def at_base_iterate(self) -> bool:
        """Whether a `base_iterate` context is entered."""
        return bool(getattr(self.engine.basic_optimizer, "_at_base_iterate", False))
