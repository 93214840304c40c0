"""Put DeepSpeed's ZeRO engine behind the common `Engine` interface."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from arsg_dist.deepspeed.base_iterate import base_iterate
from arsg_dist.deepspeed.checkpoint.engine_state import engine_state, load_engine_state
from arsg_dist.engine import (
    Capabilities,
    Communicator,
    Engine,
    EngineState,
    Ranks,
    SavedState,
    all_finite,
    announce_to_torch,
    collective_timeout,
    copy_weights,
    init_method,
    torch_communicator,
)

_SHARED_MEMORY: Final = Path("/dev/shm")
_NAME: Final = "deepspeed_allreduce_buffer"
_MIB_PER_RANK: Final = 67  # 66 and 8 bytes


def connect(ranks: Ranks) -> Communicator:
    """Join this process to the job; return its communicator. Collective.

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
    # Before the first collective, which would take device 0 on every rank. LOCAL_RANK is DeepSpeed's, too; with one GPU
    # per task every rank sees its own as device 0, whatever its number on the host.
    device = int(os.environ["LOCAL_RANK"])
    get_accelerator().set_device(device)
    require_shared_memory(get_accelerator().device_name(device))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    timeout = collective_timeout()
    options = {"timeout": timeout} if timeout else {}
    deepspeed.init_distributed(verbose=False, init_method=init_method(), **options)
    communicator = torch_communicator(ranks, torch.device(get_accelerator().device_name(device)))
    release_shared_memory()
    return communicator


def require_shared_memory(device: str) -> None:
    """Refuse ranks whose memory for DeepSpeed's CPU operator has no room: they would die of a signal, or hang.

    Before they meet, when none of them has taken its own.

    Args:
        device: of this rank, in torch's words.

    Raises:
        ValueError: there is no room, with what would help.
    """
    ranks = os.environ.get("LOCAL_SIZE", "")
    # Set by the deepspeed launcher alone; without it, and over several hosts, DeepSpeed takes no such memory.
    if not device.startswith("cpu") or ranks != os.environ["WORLD_SIZE"] or not _SHARED_MEMORY.is_dir():
        return
    free, needed = shutil.disk_usage(_SHARED_MEMORY).free >> 20, _MIB_PER_RANK * int(ranks)
    if free < needed:
        raise ValueError(
            f"{_SHARED_MEMORY} has {free} MiB free, and DeepSpeed's {ranks} CPU ranks on this host need {needed}: give "
            "it more room (docker --shm-size, in Kubernetes an emptyDir of medium Memory mounted there), remove what "
            f"dead jobs left there ({_NAME}_*), or start the ranks by torchrun, under which DeepSpeed takes none"
        )


def capabilities_at(stage: int) -> Capabilities:
    """Return what code above an engine may count on at a ZeRO stage."""
    if stage < 3:
        return Capabilities()
    refused = "ZeRO stage 3, under which no rank holds the whole weights: use a DeepSpeed config with stage 0, 1 or 2"
    return Capabilities(no_twin=refused, no_replicas=refused)


def release_shared_memory() -> None:
    """Release the memory that DeepSpeed's CPU operator leaves in /dev/shm. Collective.

    DeepSpeed 0.19.8 leaves 66 MiB of memory per rank in /dev/shm for ever, under a name with the job's master port.
    To be called after `deepspeed.init_distributed` (`connect` does): the ranks have mapped each other's memory by then
    and need its name no more. Elsewhere than on CPU ranks of one host there is nothing to release.
    """
    deepspeed.comm.barrier()
    forget_name(deepspeed.comm.get_rank())


def forget_name(rank: int | str) -> None:
    """Remove the name of one rank's shared memory, when no rank will look for it."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    (_SHARED_MEMORY / f"{_NAME}_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


class DeepSpeedEngine(Engine):
    """Train a model under DeepSpeed, its optimizer state sharded as the config says.

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
        """Add the gradient; DeepSpeed averages it over micro-batches and ranks."""
        self.engine.backward(loss)

    def step(self) -> None:
        """End a micro-batch; DeepSpeed updates the weights after the last one."""
        before = self.engine.skipped_steps
        if self._skip_nonfinite and self.engine.optimizer is self.engine.basic_optimizer:
            self._leave_out_nonfinite()
        self.engine.step()
        self.skipped_updates += self.engine.skipped_steps - before

    def _leave_out_nonfinite(self) -> None:
        """Drop bad gradients at stage 0 in fp32, whose step then changes nothing."""
        if not self.engine.is_gradient_accumulation_boundary():
            return
        if not all_finite(p.grad for p in self.engine.module.parameters() if p.grad is not None):
            self.engine.module.zero_grad(set_to_none=True)
            self.skipped_updates += 1

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """Gather the model's state dict, under ZeRO stage 3 from all ranks. Collective."""
        parts = [p for p in self.engine.module.parameters() if hasattr(p, "ds_id")]
        gathered = deepspeed.zero.GatheredParameters(parts) if parts else nullcontext()
        with gathered:
            return copy_weights(self.engine.module) if self.communicator.rank == 0 else {}

    def local_parameters(self) -> Iterator[torch.Tensor]:
        """Yield the parameters, under ZeRO stage 3 this rank's parts."""
        for parameter in self.engine.module.parameters():
            yield getattr(parameter, "ds_tensor", parameter)

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the parameters, at stages 0 to 2."""
        if self.capabilities.no_replicas:
            raise NotImplementedError("under ZeRO stage 3 no rank holds whole weights to compare")
        yield from self.engine.module.named_parameters()

    def state(self) -> EngineState:
        """Offer this rank's shards, and its share of what every rank holds alike."""
        self._refuse_at_base_iterate("state")
        return engine_state(self.engine, self.communicator.rank, self.communicator.world_size)

    def load_state(self, saved: SavedState) -> None:
        """Read the pieces that this rank holds, under any stage. Collective."""
        self._refuse_at_base_iterate("load_state")
        load_engine_state(self.engine, saved, self.communicator)

    def base_iterate(self) -> AbstractContextManager[None]:
        """Move the parameters to θ and back. Collective."""
        return base_iterate(self.engine)

    @property
    def at_base_iterate(self) -> bool:
        """Tell whether a `base_iterate` context is entered."""
        return bool(getattr(self.engine.basic_optimizer, "_at_base_iterate", False))
