"""Put torch's DistributedDataParallel behind the `Engine` interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arsg_dist.ddp.reducer import Reducer
from arsg_dist.ddp.shards import Shards, load_sharded, sharded_state, untrained
from arsg_dist.engine import Communicator, EngineState, JobError, LocalEngine, SavedState, all_finite
from arsg_dist.optim.by_name import check_element_wise, inner_of


class DDPEngine(LocalEngine):
    """Replicate model and optimizer; average gradients during the backward pass.

    Args:
        module: the model, on this rank's device; rank 0's weights and buffers are broadcast. Buffers (batch norm's
            statistics) are each rank's own from then on, as under the other engines.
        optimizer: over the model's parameters.
        communicator: from `connect_torch`.
        accumulation_steps: micro-batches per update and rank; gradients travel in the last of them only.
        clip_grad_norm: the averaged gradient is scaled down to this norm if it is larger; 0 for never.
        loss_scaling: scale the loss dynamically, as fp16 autocast needs; updates whose gradients overflow are skipped.
        skip_nonfinite: leave out updates whose gradient is not finite; under loss scaling they are in any case.
        shards: divide the update and the optimizer's state among the ranks; the optimizer is over their `groups`.
        distribution: further keyword arguments of `DistributedDataParallel`, such as `bucket_cap_mb` or
            `find_unused_parameters`; with shards only the latter.

    Raises:
        TypeError: the update is to be divided, and the optimizer is not known to update each element by itself, or
            there are other arguments of `DistributedDataParallel`.
        JobError: it is to be divided, and a rank has another network.
    """

    kind = "ddp"

    def __new__(cls, *_: Any, shards: Shards | None = None, **__: Any) -> Self:
        """Make the engine that divides the update, where there are shards."""
        kind: Any = ShardedDDPEngine if shards is not None and cls is DDPEngine else cls
        made: Self = super().__new__(kind)
        return made

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
        shards: Shards | None = None,
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
        self._distribute(shards, distribution)
        self._announce_micro_batch()

    def _distribute(self, shards: Shards | None, distribution: dict[str, Any]) -> None:
        """Put what exchanges gradients around the network. Collective."""
        if shards is not None:
            raise TypeError(f"{type(self).__name__} with shards: derive it from ShardedDDPEngine")
        on_gpu = [self.device] if self.device.type == "cuda" else None
        distribution = {"gradient_as_bucket_view": True, **distribution}
        # Before torch 2.13 the one argument, broadcast_buffers, leaves buffers out at the start too.
        older = "forward_sync_buffers" not in signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {} if older else {"forward_sync_buffers": False}
        self._parallel = DistributedDataParallel(self._network, device_ids=on_gpu, **buffers, **distribution)
        if older:
            self._parallel.broadcast_buffers = False
        self.module = self._parallel

    def _announce_micro_batch(self) -> None:
        """Exchange gradients in the last micro-batch only."""
        self._parallel.require_backward_grad_sync = self._ends_update


class ShardedDDPEngine(DDPEngine):
    """Replicate the model, and divide the update and the optimizer's state; what `DDPEngine` with `shards` is."""

    _shards: Shards
    _reducer: Reducer

    def _distribute(self, shards: Shards | None, distribution: dict[str, Any]) -> None:
        if shards is None:
            raise TypeError(f"{type(self).__name__} needs shards")
        find_unused = bool(distribution.pop("find_unused_parameters", False))
        if distribution:
            raise TypeError(
                f"{', '.join(distribution)}: of DistributedDataParallel, which a divided update does without; leave it "
                "out (Shards takes bucket_cap_mb)"
            )
        check_divided(type(inner_of(self.optimizer)))
        self._check_networks()
        self._shards = shards
        self._reducer = Reducer(self._network, shards, self.communicator, find_unused=find_unused)
        whole = [parameter for _, parameter in untrained(self._network, shards)]
        for tensor in (*(bucket.whole for bucket in shards.buckets), *whole, *self._network.buffers()):
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, 0)
            tensor.detach().copy_(sent)

    def _check_networks(self) -> None:
        """Refuse networks of which a rank has another. Collective."""
        own = [
            [name, list(tensor.shape), str(tensor.dtype)]
            for name, tensor in (*self._network.named_parameters(), *self._network.named_buffers())
        ]
        of_ranks = self.communicator.all_gather_object(own)
        if others := [rank for rank, held in enumerate(of_ranks) if held != of_ranks[0]]:
            raise JobError(f"rank {', '.join(map(str, others))} has another network than rank 0")

    def _announce_micro_batch(self) -> None:
        self._reducer.begin(ends_update=self._ends_update)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient; in the last micro-batch of an update, until this rank's parts have their average."""
        super().backward(loss)
        self._reducer.finish()

    def _update(self) -> None:
        super()._update()
        self._network.zero_grad()

    def _gradient_is_finite(self) -> bool:
        finite = all_finite([*self._gradients(), *self._gradients_of_others()])
        return not self.communicator.start_any(not finite)()

    def _gradients(self) -> list[torch.Tensor]:
        return [piece.part.grad for piece in self._shards.pieces() if piece.part.grad is not None]

    def _gradients_of_others(self) -> list[torch.Tensor]:
        """Return those of parameters that no group has, which every rank has whole."""
        return [parameter.grad for parameter in self._reducer.others if parameter.grad is not None]

    def _clip(self) -> None:
        if self.loss_scaling:
            self._unscale_shards()
        if self._clip_grad_norm:
            # They count in the norm as they do undivided.
            square = sum(
                (grad.float().square().sum() for grad in self._gradients_of_others()),
                torch.zeros((), device=self.device),
            )
            self._clip_parts(self._gradients(), besides=square / self.communicator.world_size)

    def _step(self) -> None:
        super()._step()
        self._shards.gather()

    def _own_state(self) -> EngineState:
        rank, world_size = self.communicator.rank, self.communicator.world_size
        self._tell_base_iterate_scales()
        return sharded_state(self.kind, self._network, self.optimizer, self._shards, rank, world_size)

    def _tell_base_iterate_scales(self) -> None:
        """Bring α·η of the last update to ranks that have no part of a group: what is saved of groups is rank 0's."""
        groups = self.optimizer.param_groups
        own = [
            float(group["base_iterate_scale"]) if group["params"] and "base_iterate_scale" in group else None
            for group in groups
        ]
        for group, scales in zip(
            groups, zip(*self.communicator.all_gather_object(own), strict=True), strict=True
        ):
            known = [scale for scale in scales if scale is not None]
            if known and not group["params"]:
                group["base_iterate_scale"] = known[0]

    def load_state(self, saved: SavedState) -> None:
        """Load what this rank holds, and bring the parts together. Collective."""
        super().load_state(saved)
        self._shards.gather()

    def _load_own_state(self, saved: SavedState) -> None:
        load_sharded(self._network, self.optimizer, self._shards, saved)

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield parameters."""
        yield from self._network.named_parameters()

    @contextmanager
    def base_iterate(self) -> Iterator[None]:
        """Move the parameters to θ and back. Collective."""
        with super().base_iterate():
            self._shards.gather()
            yield
        self._shards.gather()


def check_divided(kind: type[torch.optim.Optimizer]) -> None:
    """Raise TypeError for a class of optimizers whose update cannot be divided among the ranks."""
    check_element_wise(
        kind, "leave shard_update (shards of a DDPEngine) out, under which every rank holds them whole"
    )
