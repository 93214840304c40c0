"""DeepSpeed's ZeRO engine behind the common `Engine` interface."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from arsg_dist.deepspeed.base_iterate import base_iterate
from arsg_dist.deepspeed.shared_memory import release_shared_memory
from arsg_dist.engine import (
    Communicator,
    Engine,
    Ranks,
    TorchCommunicator,
    announce_to_torch,
    collective_timeout,
)

_TAG = "deepspeed"
_UNIVERSAL_TAG = "universal"


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
    deepspeed.init_distributed(verbose=False, **({"timeout": timeout} if timeout else {}))
    communicator = TorchCommunicator(_device(ranks))
    if communicator.world_size != ranks.world_size:
        raise ValueError(
            f"the launcher announced {ranks.world_size} ranks but {communicator.world_size} came up"
        )
    release_shared_memory()
    return communicator


def _device(ranks: Ranks) -> torch.device:
    return torch.device(get_accelerator().device_name(ranks.local_rank))


class DeepSpeedEngine(Engine):
    """A model under DeepSpeed, its optimizer state sharded by the ZeRO stage of the config.

    Args:
        module: the model; DeepSpeed moves it to this rank's device and casts it as the config says.
        config: a complete DeepSpeed config with an optimizer section (`resolve_config` makes one).
        communicator: from `connect`.
        parameter_groups: as torch optimizers take them; default one group of all trainable parameters.
    """

    def __init__(
        self,
        module: nn.Module,
        config: dict[str, Any],
        communicator: Communicator,
        *,
        parameter_groups: list[dict[str, Any]] | None = None,
    ) -> None:
        groups = parameter_groups or [{"params": [p for p in module.parameters() if p.requires_grad]}]
        self.engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=config)
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

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient; DeepSpeed divides by the number of micro-batches and averages over the ranks."""
        self.engine.backward(loss)

    def step(self) -> None:
        """Ends a micro-batch; DeepSpeed updates the weights after the last one."""
        self.engine.step()

    def save(self, directory: Path, progress: dict[str, Any]) -> None:
        """Every rank writes its shard; converted, the directory can be read on any number of ranks."""
        try:
            self.engine.save_checkpoint(
                str(directory), tag=_TAG, client_state={"progress": progress}, save_latest=False
            )
        except OSError as error:
            # The other ranks wait inside DeepSpeed: this cannot be agreed on, only end the job.
            raise RuntimeError(f"DeepSpeed could not write to {directory}: {error}") from error

    def load(self, directory: Path) -> dict[str, Any]:
        """Every rank reads its shard, or with ``"checkpoint": {"load_universal": true}`` its part of the converted one.

        DeepSpeed's files are pickles: load only checkpoints you trust.
        """
        saved, universal = directory / _TAG, directory / _UNIVERSAL_TAG
        convert = f"python -m arsg_dist.deepspeed.universal {saved} {universal}"
        if not saved.is_dir() and not universal.is_dir():
            raise ValueError(
                f"{directory} was not written by DeepSpeed: resume it with the engine that wrote it"
            )
        by_universal = self.engine.load_universal_checkpoint()
        shards = list(saved.glob("*zero_pp_rank_*_optim_states.pt"))
        if by_universal and not universal.is_dir():
            raise ValueError(f"the DeepSpeed config has checkpoint.load_universal: run '{convert}' first")
        if not by_universal and shards and len(shards) != self.communicator.world_size:
            raise ValueError(
                f"{directory} was written by {len(shards)} ranks and this job has {self.communicator.world_size}: "
                f"resume on {len(shards)} ranks; or run '{convert}' and set "
                '"checkpoint": {"load_universal": true} in the DeepSpeed config'
            )
        path, client_state = self.engine.load_checkpoint(
            str(directory), tag=_UNIVERSAL_TAG if by_universal else _TAG
        )
        if path is None:
            raise ValueError(f"DeepSpeed could not load {directory}")
        progress: dict[str, Any] = client_state["progress"]
        return progress

    def base_iterate(self) -> AbstractContextManager[None]:
        """Moves the parameters to θ and back; see `arsg_dist.deepspeed.base_iterate`."""
        return base_iterate(self.engine)
