"""Evaluate at the base iterate θ under DeepSpeed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from arsg_dist.deepspeed.checkpoint.zero_state import (
    Shard,
    needed_state,
    optimizer_of,
    publish_copies,
    release_whole_parameters,
    shards_of,
)
from arsg_dist.optim import ARSG, RemoteObservation
from arsg_dist.optim.base_iterate import base_iterate_point

_CHUNK: Final = 1 << 24
"""Elements converted at a time: the conversion has a few temporary tensors of that size in fp32."""

_FORBIDDEN: Final = {
    "backward": "engine.backward",
    "_backward_prologue": "backward of a loss",  # under ZeRO, its gradients would go into the next update
    "step": "engine.step",
    "save_checkpoint": "engine.save_checkpoint",
    "load_checkpoint": "engine.load_checkpoint",
    "save_16bit_model": "engine.save_16bit_model",
    "save_fp16_model": "engine.save_fp16_model",
}
"""Methods of the engine → what messages call them."""


@contextmanager
def base_iterate(engine: Any) -> Iterator[None]:
    """Move the parameters to the base iterate θ, and back to x on leaving. Collective.

    As `arsg_dist.ARSG.base_iterate`, for an engine of `deepspeed.initialize` under any ZeRO stage and precision::

        with arsg_dist.deepspeed.base_iterate(engine), torch.no_grad():
            outputs = engine(inputs)

    θ is computed from the fp32 masters and rounded to the parameters' dtype; masters and optimizer state are not
    touched. Leaving, also by an exception, restores the parameters bit by bit. Each rank keeps a copy of its own part
    of the parameters meanwhile: 1/ranks of them under stages 1 to 3. Parameters never stepped stay where they are.

    Args:
        engine: the DeepSpeed engine.

    Raises:
        TypeError: not a DeepSpeed engine, or one with another optimizer.
        ValueError: parameters or optimizer state on NVMe, or experts spread over ranks.
        RuntimeError: nested use; or inside `engine.step`, `backward` of the engine or of a loss, saving or loading; or
            incomplete state.
    """
    optimizer = optimizer_of(engine)
    optimizer._refuse_at_base_iterate("base_iterate")
    shards = [shard for shard in shards_of(engine) if shard.state]
    for shard in shards:
        check_complete(shard)
    kept: list[Tensor] = []
    optimizer._at_base_iterate = True
    # Of the instance, not of its class: a boost that listens to `backward`.
    own = {name: vars(engine)[name] for name in _FORBIDDEN if name in vars(engine)}
    for name, called in _FORBIDDEN.items():
        setattr(engine, name, _refusal(optimizer, called))
    try:
        release_whole_parameters(engine)
        for shard in shards:
            kept.append(shard.copy.detach().clone())
            _move_to_base_iterate(shard)
        publish_copies(engine)
        yield
    finally:
        release_whole_parameters(engine)
        with torch.no_grad():
            for shard, x in zip(shards, kept, strict=False):
                shard.copy.copy_(x)
        publish_copies(engine)
        for name in _FORBIDDEN:
            delattr(engine, name)
        vars(engine).update(own)
        optimizer._at_base_iterate = False


def _refusal(optimizer: ARSG | RemoteObservation, called: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        optimizer._refuse_at_base_iterate(called)

    return refuse


def check_complete(shard: Shard) -> None:
    """Raise RuntimeError if the state of a stepped shard does not define θ."""
    missing = needed_state(shard.group) - {"slow_param"} - shard.state.keys()
    if missing:
        raise RuntimeError(
            f"the optimizer state lacks {sorted(missing)}, so θ is not defined: settings changed after the first step, "
            "or a checkpoint lost it"
        )


@torch.no_grad()
def _move_to_base_iterate(shard: Shard) -> None:
    if shard.master.dim() != 1:  # of stage 0, in the parameter's shape and layout
        shard.copy.copy_(theta_of(shard, lambda tensor: tensor))
        return
    for start in range(0, shard.master.numel(), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        shard.copy[chunk] = theta_of(shard, lambda tensor, chunk=chunk: tensor[chunk])  # type: ignore[misc]


def theta_of(shard: Shard, cut: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute θ of a part of a shard.

    Args:
        shard: with complete state.
        cut: takes the part out of the master, or out of a tensor of its shape.
    """
    state = {
        name: cut(value) if isinstance(value, Tensor) and value.shape == shard.master.shape else value
        for name, value in shard.state.items()
    }
    return base_iterate_point(cut(shard.master).detach(), state, shard.group)
