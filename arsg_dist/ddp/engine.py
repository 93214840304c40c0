"""torch's DistributedDataParallel behind the common `Engine` interface."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arsg_dist.engine import (
    Communicator,
    LocalEngine,
    Ranks,
    TorchCommunicator,
    announce_to_torch,
    collective_timeout,
    init_method,
)


def connect(ranks: Ranks) -> Communicator:
    """Join this process to the job through torch.distributed: NCCL on GPUs, else Gloo. Collective.

    Args:
        ranks: from `discover_ranks`.

    Raises:
        ValueError: no launcher announced the ranks, or the job came up with another number of ranks.
    """
    if ranks.launcher in ("none", "horovodrun"):
        raise ValueError(
            "this process was not started by torchrun, srun or mpirun: "
            "start it with 'torchrun --nproc-per-node 2 SCRIPT ...'"
        )
    announce_to_torch(ranks)
    device = _device(ranks)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # before the first collective, which would take device 0 on every rank
    timeout = collective_timeout()
    options: dict[str, Any] = {"timeout": timeout} if timeout else {}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=init_method(), **options)
    if dist.get_world_size() != ranks.world_size:
        raise ValueError(
            f"the launcher announced {ranks.world_size} ranks but {dist.get_world_size()} came up"
        )
    return TorchCommunicator(device)


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", ranks.local_rank % torch.cuda.device_count())


class DDPEngine(LocalEngine):
    """Hold model and optimizer on every rank; DistributedDataParallel averages gradients during the backward pass.

    Args:
        module: the model, on this rank's device; rank 0's weights and buffers are broadcast. Buffers (batch norm's
            statistics) are each rank's own from then on, as under the other engines.
        optimizer: over the model's parameters.
        communicator: from `connect`.
        accumulation_steps: micro-batches per update and rank; gradients travel in the last of them only.
        clip_grad_norm: the averaged gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
        skip_nonfinite: leave out updates whose gradient is not finite; under loss scaling they are in any case.
        distribution: further keyword arguments of `DistributedDataParallel`, such as `bucket_cap_mb` or
            `find_unused_parameters`.
    """

    kind = "ddp"

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        communicator: Communicator,
        *,
        accumulation_steps: int = 1,
        clip_grad_norm: float = 0.0,
        loss_scaling: bool = False,
        skip_nonfinite: bool = False,
        **distribution: Any,
    ) -> None:
        super().__init__(
            module,
            optimizer,
            communicator,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            loss_scaling=loss_scaling,
            skip_nonfinite=skip_nonfinite,
        )
        on_gpu = [self.device] if self.device.type == "cuda" else None
        distribution = {"gradient_as_bucket_view": True, **distribution}
        self._parallel = DistributedDataParallel(
            module, device_ids=on_gpu, forward_sync_buffers=False, **distribution
        )
        self.module = self._parallel
        self._choose_exchange()

    def step(self) -> None:
        """Count a micro-batch; update the weights after the last of an update."""
        super().step()
        self._choose_exchange()

    def _choose_exchange(self) -> None:
        """Whether the next backward pass exchanges gradients, which DDP decides in the forward pass before it."""
        self._parallel.require_backward_grad_sync = (self._micro_batches + 1) % self.accumulation_steps == 0
