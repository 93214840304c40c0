"""Loads a saved run into a DeepSpeed engine of any ZeRO stage, precision and number of ranks.

DeepSpeed 0.19.8 has two loaders of its own, for stages 1 and 2 and for stage 3. They know two moments only, leave the
model's buffers and frozen parameters as they are, give every group the first one's settings (stage 3), and do not know
stage 0. This one takes their place for engines with ARSG, and reads the portable checkpoints of `arsg_dist.checkpoint`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import deepspeed
import torch
from torch import Tensor

from arsg_dist.deepspeed.layout import Piece
from arsg_dist.deepspeed.saved_files import check_state_is_there
from arsg_dist.deepspeed.shards import (
    LOSS_SCALER,
    SCALER_STATE,
    Shard,
    dynamic_scaler,
    frozen_pieces,
    group_names,
    persistent_buffers,
    publish_copies,
    release_whole_parameters,
    shapes_of,
    shards_of,
)
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import BUFFER, PARAMETER, restore_settings
from arsg_dist.optim import ARSG
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


def check_saved(engine: Any, saved: SavedState, with_optimizer: bool) -> None:
    """Compares a saved run with the engine, before anything is changed.

    Raises:
        ValueError: something is missing in it or does not fit.
    """
    shapes, grouped = shapes_of(engine), group_names(engine)
    trained = {name for names in grouped for name in names}
    for name, shape in shapes.items():
        _check_parameter(saved, name, shape, frozen=name not in trained)
    for name, buffer in persistent_buffers(engine):
        saved.check_shape(BUFFER, name, buffer.shape)
    if not with_optimizer:
        return
    check_state_is_there(saved.where, saved.counters, found=any(map(saved.entries, trained)))
    for index, names in enumerate(grouped):
        if not names:
            continue  # stage 0 in fp32 keeps groups whose parameters are all frozen
        group = saved.settings_for(names, index, len(grouped))
        entries = saved.entries(representative(saved, names))
        for name in names:
            _check_entries(saved, index, name, representative(saved, names))
        lost = needed_state(group) - entries if entries and "preconditioner" in group else set()
        if lost == {"max_exp_avg_sq"} and _restart_allowed.get():
            continue
        if lost:
            raise ValueError(
                f"{saved.where} has lost {sorted(lost)} of the optimizer state, as with DeepSpeed's own converter: "
                "convert the original checkpoint by 'python -m arsg_dist.deepspeed.universal INPUT OUTPUT'"
                + (
                    "; if it is gone, load inside arsg_dist.deepspeed.restart_lost_maximum(), which restarts v̂ at v"
                    if lost == {"max_exp_avg_sq"}
                    else ""
                )
            )


def _check_parameter(saved: SavedState, name: str, shape: torch.Size, *, frozen: bool) -> None:
    spec = saved.spec(PARAMETER, name)
    if spec is None and frozen:
        raise ValueError(
            f"{saved.where} has no frozen parameter {name!r} of shape {tuple(shape)}, which the model has"
        )
    if spec is None or (not frozen and saved.group_of is not None and name not in saved.group_of):
        raise ValueError(
            f"{saved.where} has no parameter {name!r}: it is of another model, or it was frozen then"
        )
    # What DeepSpeed's own converter made of stage 3 is flat.
    if spec.shape != shape and (saved.group_of is not None or spec.numel != shape.numel()):
        raise ValueError(f"{saved.where} has {name!r} in shape {spec.shape}, the model in {tuple(shape)}")


def representative(saved: SavedState, names: list[str]) -> str:
    """The parameter that stands for a group, whose parameters DeepSpeed steps as a whole: one with state, if any."""
    return next((name for name in names if saved.entries(name)), names[0])


def _check_entries(saved: SavedState, index: int, name: str, standard: str) -> None:
    """Raises ValueError if a parameter's state and that of its group's representative cannot be one flat state."""
    entries, wanted = saved.entries(name), saved.entries(standard)
    if not entries and wanted <= set(MOMENTS["amsgrad"]):
        return  # never had a gradient: its moments are zero
    steps = (
        {float(saved.number(n, "step")) for n in (name, standard)} if "step" in entries & wanted else set()
    )
    if entries != wanted or len(steps) > 1:
        raise ValueError(
            f"{saved.where}: parameters {standard!r} and {name!r} of group {index} have made different numbers of "
            "steps, and DeepSpeed steps a group as a whole"
        )
    for entry in entries:
        spec, value = saved.spec(entry, name), saved.spec(PARAMETER, name)
        if spec is not None and value is not None and spec.numel != value.numel:
            raise ValueError(
                f"{saved.where} has {entry!r} of {name!r} in shape {spec.shape}: it cannot be sharded"
            )


def needed_state(group: dict[str, Any]) -> set[str]:
    """Names of the entries without which a parameter of the group cannot go on."""
    needed = set(MOMENTS[group["preconditioner"]])
    if needs_step(group):
        needed.add("step")
    if group["lookahead_k"] > 0:
        needed.add("slow_param")
    return needed


@torch.no_grad()
def fill(engine: Any, saved: SavedState, with_optimizer: bool) -> None:
    """Fills this rank's part of the engine, after `check_saved`; `publish` makes it whole.

    Args:
        engine: fresh or already stepped.
        saved: where from; read in pieces, never as a whole.
        with_optimizer: also the optimizer's state, settings and loss scale; else the weights only.

    Raises:
        ValueError: a file is damaged; on this rank only.
    """
    optimizer, grouped = engine.basic_optimizer, group_names(engine)
    release_whole_parameters(engine)
    if with_optimizer:
        for index, group in enumerate(optimizer.param_groups):
            restore_settings(group, saved.settings_for(grouped[index], index, len(grouped)))
    restarted = False
    for shard in shards_of(engine):
        _fill(shard.master, shard.pieces, saved, PARAMETER)
        if with_optimizer:
            # A shard of padding alone has the state of its group too.
            index = next(i for i, group in enumerate(optimizer.param_groups) if group is shard.group)
            restarted |= _load_state(optimizer, shard, saved, representative(saved, grouped[index]))
        if shard.copy is not shard.master:
            shard.copy.copy_(shard.master)
    _load_module(engine, saved, {name for names in grouped for name in names})
    if with_optimizer:
        _load_loss_scale(engine.optimizer, saved.loss_scale)
    if restarted and deepspeed.comm.get_rank() == 0:
        warnings.warn(
            f"{saved.where} has lost ARSG's running maximum v̂ (max_exp_avg_sq): it restarts at v, and the run does "
            "not go on as it would have",
            stacklevel=2,
        )


def publish(engine: Any) -> None:
    """Gives every rank the whole parameters that the ranks have filled; every rank must call it."""
    publish_copies(engine)
    link_fragments(engine)


def _fill(tensor: Tensor, pieces: list[Piece], saved: SavedState, entry: str) -> None:
    for piece in pieces:
        if entry == PARAMETER or entry in saved.entries(piece.name):
            values = saved.read(entry, piece.name, piece.start, piece.numel)
            if piece.numel == tensor.numel():
                tensor.copy_(values.view(tensor.shape))
            else:
                tensor.view(-1).narrow(0, piece.offset, piece.numel).copy_(values)


def _load_state(optimizer: Any, shard: Shard, saved: SavedState, standard: str) -> bool:
    entries = saved.entries(standard)
    state: dict[str, Any] = {}
    for entry in sorted(entries):
        spec = saved.spec(entry, standard)
        if spec is None:
            state[entry] = saved.number(standard, entry)
            continue
        state[entry] = torch.zeros_like(shard.master, dtype=spec.dtype, requires_grad=False)
        _fill(state[entry], shard.pieces, saved, entry)
    arsg = isinstance(optimizer, ARSG)
    restarted = arsg and bool(entries) and "max_exp_avg_sq" in needed_state(shard.group) - entries
    if restarted:
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
    optimizer.state.pop(shard.master, None)
    if state:
        if arsg:
            restore_loaded(state, shard.master, shard.group)
        optimizer.state[shard.master] = state
    return restarted


def _load_module(engine: Any, saved: SavedState, trained: set[str]) -> None:
    for name, buffer in persistent_buffers(engine):
        buffer.copy_(saved.whole(BUFFER, name))
    for parameter, name in engine.param_names.items():
        if name in trained:
            continue
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(saved.whole(PARAMETER, name))
            continue
        for piece in frozen_pieces(parameter, name):
            values = saved.read(PARAMETER, name, piece.start, piece.numel)
            parameter.ds_tensor.data.view(-1).narrow(0, piece.offset, piece.numel).copy_(values)


def _load_loss_scale(wrapper: Any, saved: dict[str, Any] | None) -> None:
    scaler = dynamic_scaler(wrapper)
    if saved is None or scaler is None:
        return
    own = saved if saved.get("kind", LOSS_SCALER) == LOSS_SCALER else {"cur_scale": saved["scale"]}
    for key in SCALER_STATE:
        if key in own and hasattr(scaler, key):
            setattr(scaler, key, own[key])


def link_fragments(engine: Any) -> None:
    """Lets DeepSpeed's `safe_get_full_optimizer_state` and the like see the state that was loaded.

    DeepSpeed links them once, after the first step; loading into an engine that has stepped undoes that for good.
    """
    wrapper, state = engine.optimizer, engine.basic_optimizer.state
    if hasattr(wrapper, "_hp_optimizer_states_linked") and state:
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()
