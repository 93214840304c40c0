"""Loads a universal checkpoint into an engine with ARSG of any ZeRO stage, precision and number of ranks.

DeepSpeed 0.19.8 has two loaders of its own, for stages 1 and 2 and for stage 3. They know two moments only, leave the
model's buffers and frozen parameters as they are, give every group the first one's settings (stage 3), and do not know
stage 0. This one takes their place for engines with ARSG.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import deepspeed
import torch
from torch import Tensor

from arsg_dist.deepspeed.layout import Piece, pieces_of_each, write_piece
from arsg_dist.deepspeed.saved import UniversalCheckpoint
from arsg_dist.deepspeed.shards import (
    Shard,
    group_names,
    optimizer_of,
    publish_copies,
    shapes_of,
    shards_of,
)
from arsg_dist.optim.state import MOMENTS, needs_step, restore_loaded

_restart_allowed: ContextVar[bool] = ContextVar("restart_allowed", default=False)


@contextmanager
def restart_lost_maximum() -> Iterator[None]:
    """Lets universal checkpoints without v̂ be loaded: v̂ starts again at v, as with `ARSG.restart`.

    DeepSpeed's own converter drops max_exp_avg_sq, and loading its result is refused for that. Where the original
    checkpoint is gone, this is the way to go on; rank 0 warns, for the next updates are larger than they would have
    been::

        with arsg_dist.deepspeed.restart_lost_maximum():
            engine.load_checkpoint("checkpoints")
    """
    token = _restart_allowed.set(True)
    try:
        yield
    finally:
        _restart_allowed.reset(token)


def saved_group(engine: Any, saved: UniversalCheckpoint, index: int, names: list[str]) -> dict[str, Any]:
    """The saved settings for the engine's group of these parameters.

    Raises:
        ValueError: the checkpoint has groups that cannot be told apart here, or none for them.
    """
    if saved.group_of is None:
        count = len(optimizer_of(engine).param_groups)
        if len(saved.groups) != count:
            raise ValueError(
                f"{saved.directory} has {len(saved.groups)} parameter groups and the engine has {count}"
            )
        return saved.groups[index]
    sources = sorted({saved.group_of[name] for name in names})
    first, *others = (saved.groups[source] for source in sources)
    if any(other != first for other in others):
        raise ValueError(
            f"the engine's parameter group {index} has parameters of groups {sources} of {saved.directory}, whose "
            "settings differ: make the same groups"
        )
    return first


def check_universal(engine: Any, saved: UniversalCheckpoint, with_optimizer: bool) -> None:
    """Compares a universal checkpoint with the engine, before anything is changed.

    Raises:
        ValueError: something is missing in it or does not fit.
    """
    where, shapes = saved.directory, shapes_of(engine)
    grouped = group_names(engine)
    for name in (name for names in grouped for name in names):
        if not (where / "zero" / name / "fp32.pt").is_file() or (
            saved.group_of is not None and name not in saved.group_of
        ):
            raise ValueError(
                f"{where} has no parameter {name!r}: it is of another model, or it was frozen then"
            )
        found = saved.master(name).shape
        if found != shapes[name] and (saved.group_of is not None or found.numel() != shapes[name].numel()):
            raise ValueError(
                f"{where} has {name!r} in shape {tuple(found)}, the model in {tuple(shapes[name])}"
            )
    _check_module(engine, saved, {name for names in grouped for name in names})
    if not with_optimizer:
        return
    for index, names in enumerate(grouped):
        group = saved_group(engine, saved, index, names)
        keys = saved.keys(names[0])
        for name in names:
            if saved.keys(name) != keys or (
                "step" in keys and saved.state(name, "step") != saved.state(names[0], "step")
            ):
                raise ValueError(
                    f"{where}: parameters {names[0]!r} and {name!r} of group {index} have made different numbers of "
                    "steps, and DeepSpeed steps a group as a whole"
                )
        lost = needed_state(group) - keys if keys else set()
        if lost == {"max_exp_avg_sq"} and _restart_allowed.get():
            continue
        if lost:
            raise ValueError(
                f"{where} has lost {sorted(lost)} of the optimizer state, as with DeepSpeed's own converter: convert "
                f"the original checkpoint by 'python -m arsg_dist.deepspeed.universal INPUT OUTPUT'"
                + (
                    "; if it is gone, load inside arsg_dist.deepspeed.restart_lost_maximum(), which restarts v̂ at v"
                    if lost == {"max_exp_avg_sq"}
                    else ""
                )
            )


def needed_state(group: dict[str, Any]) -> set[str]:
    """Names of the entries without which a parameter of the group cannot go on."""
    needed = set(MOMENTS[group["preconditioner"]])
    if needs_step(group):
        needed.add("step")
    if group["lookahead_k"] > 0:
        needed.add("slow_param")
    return needed


def _check_module(engine: Any, saved: UniversalCheckpoint, trained: set[str]) -> None:
    expected = {name: buffer.shape for name, buffer in _persistent_buffers(engine)}
    present = {name: tensor.shape for name, tensor in saved.module.buffers.items()}
    shapes = {name: shape for name, shape in shapes_of(engine).items() if name not in trained}
    frozen = {name: tensor.shape for name, tensor in saved.module.frozen.items()}
    for what, wanted, found in (("buffer", expected, present), ("frozen parameter", shapes, frozen)):
        for name, shape in wanted.items():
            if found.get(name) != shape:
                raise ValueError(
                    f"{saved.directory} has no {what} {name!r} of shape {tuple(shape)}, which the model has"
                )


@torch.no_grad()
def load_universal(engine: Any, saved: UniversalCheckpoint, with_optimizer: bool) -> None:
    """Fills the engine; every rank must call it, after `check_universal`.

    Args:
        engine: fresh or already stepped.
        saved: the checkpoint.
        with_optimizer: also the optimizer's state, settings and loss scale; else the weights only.
    """
    optimizer = optimizer_of(engine)
    grouped = group_names(engine)
    if with_optimizer:
        for index, group in enumerate(optimizer.param_groups):
            group.update(saved_group(engine, saved, index, grouped[index]))
    restarted = False
    for shard in shards_of(engine):
        _fill(shard.master, shard.pieces, lambda name: saved.master(name))
        if with_optimizer:
            # A shard of padding alone has the state of its group too.
            index = next(i for i, group in enumerate(optimizer.param_groups) if group is shard.group)
            restarted |= _load_state(optimizer, shard, saved, grouped[index][0])
        if shard.copy is not shard.master:
            shard.copy.copy_(shard.master)
    _load_module(engine, saved)
    publish_copies(engine)
    if with_optimizer:
        _load_loss_scale(engine.optimizer, saved.loss_scale)
    if restarted and deepspeed.comm.get_rank() == 0:
        warnings.warn(
            f"{saved.directory} has lost ARSG's running maximum v̂ (max_exp_avg_sq): it restarts at v, and the run does "
            "not go on as it would have",
            stacklevel=2,
        )


def _fill(tensor: Tensor, pieces: list[Piece], whole: Any) -> None:
    for piece in pieces:
        write_piece(tensor, piece, whole(piece.name))


def _load_state(optimizer: Any, shard: Shard, saved: UniversalCheckpoint, representative: str) -> bool:
    keys = saved.keys(representative)
    state: dict[str, Any] = {}
    for key in sorted(keys):
        example = saved.state(representative, key)
        if key == "step":
            state[key] = example
            continue
        state[key] = torch.zeros_like(shard.master, dtype=example.dtype, requires_grad=False)
        _fill(state[key], shard.pieces, lambda name, key=key: saved.state(name, key))
    restarted = bool(keys) and "max_exp_avg_sq" in needed_state(shard.group) - keys
    if restarted:
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
    optimizer.state.pop(shard.master, None)
    if state:
        restore_loaded(state, shard.master, shard.group)
        optimizer.state[shard.master] = state
    return restarted


def _persistent_buffers(engine: Any) -> Iterator[tuple[str, Tensor]]:
    persistent = set(engine._get_buffer_names())
    return ((name, buffer) for name, buffer in engine.module.named_buffers() if name in persistent)


def _load_module(engine: Any, saved: UniversalCheckpoint) -> None:
    for name, buffer in _persistent_buffers(engine):
        buffer.copy_(saved.module.buffers[name])
    for parameter, name in engine.param_names.items():
        value = saved.module.frozen.get(name)
        if value is None:
            continue
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(value)
            continue
        group = parameter.ds_process_group
        rank, size = deepspeed.comm.get_rank(group=group), deepspeed.comm.get_world_size(group=group)
        for piece in pieces_of_each([(name, parameter.ds_numel)], rank, size):
            write_piece(parameter.ds_tensor.data, piece, value)


def _load_loss_scale(wrapper: Any, saved: dict[str, Any] | None) -> None:
    scaler = getattr(wrapper, "loss_scale_config", None) or getattr(wrapper, "loss_scaler", None)
    dynamic = getattr(scaler, "dynamic_loss_scale", getattr(scaler, "dynamic", False))
    if saved is not None and dynamic:
        for key, value in saved.items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)


def link_fragments(engine: Any) -> None:
    """Lets DeepSpeed's `safe_get_full_optimizer_state` and the like see the state that was loaded.

    DeepSpeed links them once, after the first step; loading into an engine that has stepped undoes that for good.
    """
    wrapper, state = engine.optimizer, optimizer_of(engine).state
    if hasattr(wrapper, "_hp_optimizer_states_linked") and state:
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()
