"""Evaluation at the base iterate θ under DeepSpeed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from arsg_dist.deepspeed.shards import (
    Shard,
    optimizer_of,
    publish_copies,
    release_whole_parameters,
    shards_of,
)
from arsg_dist.optim.base_iterate import base_iterate_point
from arsg_dist.optim.state import MOMENTS, needs_step

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
    """Moves the model's parameters from the observation point x to the base iterate θ, and back on leaving.

    As `arsg_dist.ARSG.base_iterate`, for an engine of `deepspeed.initialize` under any ZeRO stage and precision::

        with arsg_dist.deepspeed.base_iterate(engine), torch.no_grad():
            outputs = engine(inputs)

    θ is computed from the fp32 masters and rounded to the parameters' dtype; masters and optimizer state are not
    touched. Leaving, also by an exception, restores the parameters bit by bit. Each rank keeps a copy of its own part
    of the parameters meanwhile: 1/ranks of them under stages 1 to 3. Parameters never stepped stay where they are.

    Entering and leaving are collective: every rank must do both.

    Args:
        engine: the DeepSpeed engine.

    Raises:
        TypeError: not a DeepSpeed engine, or one with another optimizer.
        ValueError: parameters or optimizer state on NVMe, or mixtures of experts.
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
        setattr(engine, name, _refusal(called))
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


def _refusal(called: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"{called} inside base_iterate(): the parameters are not at the observation point x"
        )

    return refuse


def check_complete(shard: Shard) -> None:
    """Raises RuntimeError if the state of a stepped shard does not define θ."""
    needed = {*MOMENTS[shard.group["preconditioner"]], *(["step"] if needs_step(shard.group) else [])}
    missing = needed - shard.state.keys()
    if missing:
        raise RuntimeError(
            f"the optimizer state lacks {sorted(missing)}, so θ is not defined: settings changed after the first step, "
            "or a checkpoint lost it"
        )


@torch.no_grad()
def _move_to_base_iterate(shard: Shard) -> None:
    for target, theta in zip(_chunks(shard.copy), _base_iterate_chunks(shard), strict=True):
        target.copy_(theta)


def _base_iterate_chunks(shard: Shard) -> Iterator[Tensor]:
    """θ of a shard, piece after piece of at most 2²⁴ elements, so that its temporaries stay small.

    Yields:
        Tensors that together are the shard: flat, or the whole in the master's shape where that cannot be cut.
    """
    moments = {
        name: value
        for name, value in shard.state.items()
        if isinstance(value, Tensor) and value.shape == shard.master.shape
    }
    others = {name: value for name, value in shard.state.items() if name not in moments}
    parts = zip(*(_chunks(tensor) for tensor in (shard.master, *moments.values())), strict=True)
    for master, *values in parts:
        yield base_iterate_point(
            master.detach(), {**others, **dict(zip(moments, values, strict=True))}, shard.group
        )


def _chunks(tensor: Tensor) -> list[Tensor]:
    return (
        [tensor]
        if tensor.dim() != 1
        else [tensor[start : start + _CHUNK] for start in range(0, tensor.numel(), _CHUNK)]
    )
