"""The whole state of a ShardedOptimizer, gathered and loaded."""

import sys
from typing import Any

from arsg_dist.horovod.gather_state import gather_state
from arsg_dist.horovod.load_state import load_state
from arsg_dist.horovod.shards import Shards


class ShardedState(Shards):
    """What a ShardedOptimizer gives and takes as its state."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as the unsharded optimizer would return it, on rank 0. Every rank must call it.

        Rank 0 receives one tensor of state of one bucket at a time, so it needs the memory of the whole state and one
        bucket; the others need one bucket.

        Returns:
            On rank 0 `state` and `param_groups` as of torch, on CPU, and `master_params` (index → fp32 tensor) for
            half-precision parameters, which other optimizers ignore. On the others the same without tensors, marked
            `held_by_rank_0`; `load_state_dict` takes it.

        Raises:
            RuntimeError: called by `hvd.broadcast_optimizer_state`, by part of the ranks only, or in `base_iterate`.
        """
        if sys._getframe(1).f_globals.get("__name__") == "horovod.torch.functions":
            raise RuntimeError(
                "hvd.broadcast_optimizer_state would overwrite every rank's shard with rank 0's: leave it out. To "
                "resume, call load_state_dict(state) on every rank, where ranks other than 0 may give None"
            )
        return self.gather_state(everywhere=False)

    def gather_state(self, *, everywhere: bool) -> dict[str, Any]:
        """`state_dict`, on every rank if `everywhere`. Every rank must call it."""
        self._refuse_at_base_iterate("state_dict")
        self._require_layout("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._groups.world.meet("state_dict()")
        self._bring_masters_up_to_date()
        state = gather_state(self, everywhere=everywhere)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any] | None) -> None:  # type: ignore[override]
        """Loads what `state_dict` of this class or of the unsharded optimizer returned. Every rank must call it.

        Load the model's parameters too (before or after): half-precision parameters whose `master_params` do not
        round to them keep their own value.

        Args:
            state_dict: the whole state on every rank, each of which takes its part; or on rank 0 only and None on the
                others, to which rank 0 sends theirs, one tensor of one bucket at a time.

        Raises:
            ValueError: the state does not fit the parameters, or the ranks were given different ones.
            RuntimeError: called by part of the ranks only, in `base_iterate` or in the middle of an update.
        """
        self._refuse_at_base_iterate("load_state_dict")
        self.refuse_in_update("load_state_dict()")
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict  # type: ignore[arg-type]
        self._groups.world.meet("load_state_dict()")
        self.synchronize_parameters()
        load_state(self, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
