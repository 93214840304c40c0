"""Horovod with sharded optimizer state behind the common `Engine` interface."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from arsg_dist.engine import EngineState, SavedState
from arsg_dist.horovod.engine import HorovodEngine
from arsg_dist.horovod.sharded import ShardedOptimizer
from arsg_dist.horovod.sharded_checkpoint import load_sharded, sharded_engine_state


class HorovodShardedEngine(HorovodEngine):
    """Every rank holds the model; optimizer state and fp32 masters are divided among the ranks.

    Arguments as of `HorovodEngine`, the further ones of `ShardedOptimizer`, such as `bucket_mb`.
    """

    kind = "horovod-sharded"
    optimizer: ShardedOptimizer
    _distribute = staticmethod(ShardedOptimizer)

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

    def _gradient_is_finite(self) -> bool:
        return self.optimizer.gradient_is_finite()

    def replicated_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters."""
        self.optimizer.synchronize_parameters()
        yield from self.module.named_parameters()

    def check_next_sums(self) -> None:
        """Every bucket's sum is computed by the next rank too, from the same gradients."""
        self.optimizer.check_sums(True)

    def faulty_sums(self) -> list[str]:
        """The buckets whose two sums differ."""
        self.optimizer.check_sums(False)
        return self.optimizer.faulty_sums()

    def _clip(self) -> None:
        if self._clip_grad_norm:
            self.optimizer.synchronize()
            self._grad_scaler.unscale_(self.optimizer)
            self.optimizer.clip_grad_norm_(self._clip_grad_norm)

    def state(self) -> EngineState:
        """This rank's shards; of what every rank holds alike, its share."""
        self._refuse_at_base_iterate("state")
        state = sharded_engine_state(
            self.module, self.optimizer, self.communicator.rank, self.communicator.world_size
        )
        state.loss_scale = self._loss_scale()
        return state

    def load_state(self, saved: SavedState) -> None:
        """Every rank reads the pieces it owns."""
        self._refuse_at_base_iterate("load_state")
        with self.communicator.fail_together():
            load_sharded(self.module, self.optimizer, saved)
        self.optimizer.publish_masters()
        self._load_loss_scale(saved)
