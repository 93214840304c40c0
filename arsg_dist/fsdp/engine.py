"""Put torch's FSDP2 behind the `Engine` interface."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from arsg_dist.engine import (
    Capabilities,
    Communicator,
    EngineState,
    LocalEngine,
    SavedState,
    all_finite,
    copy_weight,
)
from arsg_dist.engine.dtensors import shard_index
from arsg_dist.fsdp.state import load_sharded, sharded_state
from arsg_dist.fsdp.units import shard
from arsg_dist.optim.state import local

CAPABILITIES = Capabilities(
    no_replicas="the engine fsdp, under which no two ranks hold the same: use the engine ddp, or shard_group: node on "
    "several hosts, whose replicas are compared"
)


class FSDPEngine(LocalEngine):
    """Shard parameters, gradients and optimizer state by `fully_shard`.

    Args:
        module: the model, after `shard`; rank 0's weights were broadcast there. Buffers such as batch norm's statistics
            are each rank's own from then on, as under the other engines.
        optimizer: over the sharded parameters; each rank's `step` updates its own shards.
        communicator: from `connect_torch`.
        accumulation_steps: micro-batches per update and rank; gradients travel in the last of them only, and are kept
            whole until then.
        clip_grad_norm: the averaged gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
        skip_nonfinite: leave out updates whose gradient is not finite; under loss scaling they are in any case.
        keep_gathered: parameters are gathered once for all micro-batches of an update, and kept whole between them; for
            a model that was sharded with `reshard_after_forward=False`.
        sharding: keyword arguments of `shard` that `hold` shards another network with; its mesh is the model's.

    Raises:
        ValueError: the model was not sharded.
    """

    kind = "fsdp"

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
        keep_gathered: bool = False,
        sharding: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(module, FSDPModule):
            raise ValueError(
                "the model is not sharded: call arsg_dist.fsdp.shard(model) before its optimizer is made"
            )
        super().__init__(
            module,
            optimizer,
            communicator,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            loss_scaling=loss_scaling,
            skip_nonfinite=skip_nonfinite,
        )
        self._sharded = module
        self._keep_gathered = keep_gathered
        self._sharding = dict(sharding or {})
        first: Any = next(module.parameters())
        self._mesh = first.device_mesh
        placed = enumerate(first.placements)
        self._replicas = math.prod(self._mesh.size(dim) for dim, place in placed if place.is_replicate())
        self.capabilities = replace(CAPABILITIES, no_replicas="") if self._replicas > 1 else CAPABILITIES
        if self._replicas > 1:
            self.shards_of_ranks = communicator.all_gather_object(shard_index(first))
        if self._mesh.device_type != self.device.type:  # shards are offloaded: passes are where the mesh is
            self.device = torch.device(self._mesh.device_type, torch.cuda.current_device())
        self._announce_micro_batch()

    def _announce_micro_batch(self) -> None:
        self._sharded.set_requires_gradient_sync(self._ends_update)
        if self._keep_gathered:
            self._sharded.set_reshard_after_backward(self._ends_update)

    def _gradient_is_finite(self) -> bool:
        return not self.communicator.start_any(not all_finite(self._gradients()))()

    def _clip(self) -> None:
        if self.loss_scaling:
            self._unscale_shards()
        if self._clip_grad_norm:
            self._clip_parts(self._gradients(), held_by=self._replicas)

    def _gradients(self) -> list[torch.Tensor]:
        """List this rank's shards of the averaged gradient."""
        return [local(p.grad) for p in self._network.parameters() if p.grad is not None]

    def local_parameters(self) -> Iterator[torch.Tensor]:
        """Yield this rank's shards."""
        reshard(self._network)
        yield from map(local, self._network.parameters())

    def hold(self, module: nn.Module) -> None:
        """Shard another network as the trained one is; each of its passes gathers it anew. Collective."""
        module.to(self.device)
        shard(module, self._mesh, **self._sharding)
        # The outermost unit too, which older releases of torch keep gathered.
        module.register_forward_hook(lambda *_: reshard(module))

    def weights_of(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Gather a state dict tensor by tensor; only rank 0 keeps them."""
        whole = {}
        for name, tensor in module.state_dict().items():
            gathered: Any = tensor.to(self.device)  # where offloaded shards can meet
            if isinstance(gathered, DTensor):
                gathered = gathered.full_tensor()
            if self.communicator.rank == 0:
                whole[name] = copy_weight(gathered)
        return whole

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this rank's shards and their state, of which its replicas hold the same.

        Raises:
            NotImplementedError: there are no replicas.
        """
        if self.capabilities.no_replicas:
            raise NotImplementedError(
                "under FSDP no two ranks hold the same weights, without replicas of shards"
            )
        reshard(self._network)
        yield from ((name, local(tensor)) for name, tensor in super().replicated_tensors())

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Move the shards to θ and back; whole parameters that a pass has left are not used again."""
        reshard(self._network)
        try:
            with super().base_iterate():
                yield
        finally:
            reshard(self._network)

    def _own_state(self) -> EngineState:
        reshard(self._network)
        return sharded_state(self.kind, self._network, self.optimizer, self.communicator.rank)

    def _load_own_state(self, saved: SavedState) -> None:
        reshard(self._network)
        load_sharded(self._network, self.optimizer, saved)


def reshard(module: nn.Module) -> None:
    """Free whole parameters that a forward pass has left, in which changed shards would not be seen."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
