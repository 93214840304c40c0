"""Horovod with sharded optimizer state behind the common `Engine` interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from torch import nn

from arsg_dist.engine import Communicator, SingleProcessEngine
from arsg_dist.horovod.sharded import ShardedOptimizer


class HorovodShardedEngine(SingleProcessEngine):
    """Every rank holds the model; optimizer state and fp32 masters are divided among the ranks.

    Its checkpoint is the file of the single process and of the replicated `HorovodEngine`, and each of them resumes
    from any of the others' on any number of ranks.

    Args:
        module: the model, on this rank's device; rank 0's weights are broadcast.
        optimizer: over the model's parameters.
        communicator: from `connect`.
        accumulation_steps: micro-batches per update and rank.
        clip_grad_norm: the averaged gradient is scaled down to this norm if it is larger; 0 for never.
        sharding: keyword arguments of `ShardedOptimizer`, such as `bucket_mb`.
    """

    optimizer: ShardedOptimizer

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        *,
        accumulation_steps: int = 1,
        clip_grad_norm: float = 0.0,
        **sharding: Any,
    ) -> None:
        hvd.broadcast_parameters(module.state_dict(), root_rank=0)
        sharded = ShardedOptimizer(
            optimizer,
            named_parameters=module.named_parameters(),
            backward_passes_per_step=accumulation_steps,
            op=hvd.Average,
            **sharding,
        )
        super().__init__(
            module, sharded, accumulation_steps=accumulation_steps, clip_grad_norm=clip_grad_norm
        )
        self.communicator = communicator

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Moves the parameters to θ and back on all ranks."""
        self._refuse_at_base_iterate("base_iterate")
        with self.optimizer.base_iterate():
            self._at_base_iterate = True
            try:
                yield
            finally:
                self._at_base_iterate = False

    def _clip(self) -> None:
        if self._clip_grad_norm:
            self.optimizer.clip_grad_norm_(self._clip_grad_norm)

    def save(self, directory: Path, progress: dict[str, Any]) -> None:
        """Gathers the state on rank 0, which writes one file."""
        self._refuse_at_base_iterate("save")
        self.optimizer.synchronize_parameters()
        optimizer = self.optimizer.state_dict()
        # Parameters lie in the memory of whole buckets, all of which a file of them would otherwise hold.
        model = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        if self.communicator.rank == 0:
            self._write(directory, model, optimizer, progress)
