"""Save and load a DeepSpeed engine's state, of any stage, precision and rank count.

DeepSpeed 0.19.8 has two loaders of its own, for stages 1 and 2 and for stage 3. They know two moments only, leave the
model's buffers and frozen parameters as they are, give every group the first one's settings (stage 3), and do not know
stage 0. This one takes their place for engines with ARSG, and reads the portable checkpoints of `arsg_dist.checkpoint`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import deepspeed
import torch
from torch import Tensor

from arsg_dist.deepspeed.checkpoint.files import COUNTERS, SCALER_STATE, check_state_is_there
from arsg_dist.deepspeed.checkpoint.partitioning import Piece, pieces_of_each, write_piece
from arsg_dist.deepspeed.checkpoint.zero_state import (
    Shard,
    group_names,
    needed_state,
    publish_copies,
    release_whole_parameters,
    shapes_of,
    shards_of,
    trained_names,
)
from arsg_dist.deepspeed.versions import loss_scaler
from arsg_dist.engine import Communicator
from arsg_dist.engine.replicated_state import add_buffers, aliases_of, load_tensors, persistent_buffers
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import (
    BUFFER,
    PARAMETER,
    EngineState,
    Group,
    TensorSpec,
    key_of,
    plain_settings,
    restore_settings,
    state_numbers,
    state_tensors,
)
from arsg_dist.optim import ARSG
from arsg_dist.optim.base_iterate import MOVEMENT
from arsg_dist.optim.by_name import inner_of
from arsg_dist.optim.state import MOMENTS, restore_loaded

LOSS_SCALER: Final = "DeepSpeed"
"""The kind of the loss scale in a saved run."""

_restart_allowed: ContextVar[bool] = ContextVar("restart_allowed", default=False)


def engine_state(engine: Any, rank: int, world_size: int) -> EngineState:
    """Offer this rank's part of a DeepSpeed engine to a checkpoint.

    Args:
        engine: of `deepspeed.initialize`.
        rank: of this process in the job.
        world_size: ranks of the job, which share the writing of what all hold alike.

    Raises:
        ValueError: experts, NVMe, or state of a kind that is not saved.
    """
    shards = list(shards_of(engine))
    shapes = {name: tuple(shape) for name, shape in shapes_of(engine).items()}
    state = EngineState("deepspeed", aliases=aliases_of(engine.module, engine.param_names))
    state.groups = [
        Group(plain_settings(group), names)
        for group, names in zip(engine.basic_optimizer.param_groups, group_names(engine), strict=True)
    ]
    replicated: dict[str, Tensor] = {}
    for shard in shards:
        _add_shard(state, shard, shapes, replicated)
    for name, held, pieces in _frozen_parameters(engine):
        if pieces is None:
            replicated[key_of(PARAMETER, name)] = held
        for piece in pieces or ():
            spec = TensorSpec(held.dtype, shapes[name])
            state.add(key_of(PARAMETER, name), spec, piece.start, piece.numel, held, piece.offset)
    state.add_replicated(replicated, rank, world_size)
    add_buffers(state, engine.module, rank)
    scaler = dynamic_scaler(engine.optimizer)
    if scaler is not None:
        kept = {key: getattr(scaler, key) for key in SCALER_STATE if hasattr(scaler, key)}
        state.loss_scale = {"kind": LOSS_SCALER, "scale": float(kept["cur_scale"]), **kept}
    state.counters = {name: int(getattr(engine, name)) for name in COUNTERS}
    return state


def _add_shard(
    state: EngineState, shard: Shard, shapes: dict[str, tuple[int, ...]], replicated: dict[str, Tensor]
) -> None:
    tensors = {PARAMETER: shard.master, **dict(state_tensors(shard.state))}
    for entry, tensor in tensors.items():
        if tensor.numel() != shard.master.numel():
            raise ValueError(f"the optimizer keeps {entry!r} in shape {tuple(tensor.shape)}: it is not saved")
    for piece in shard.pieces:
        if numbers := state_numbers(piece.name, shard.state):
            state.numbers[piece.name] = numbers
        for entry, tensor in tensors.items():
            key = key_of(entry, piece.name)
            if shard.process_group is None:
                replicated[key] = tensor
            else:
                spec = TensorSpec(tensor.dtype, shapes[piece.name])
                state.add(key, spec, piece.start, piece.numel, tensor, piece.offset)


def load_engine_state(engine: Any, saved: SavedState, communicator: Communicator) -> None:
    """Load a saved run into a DeepSpeed engine. Collective.

    Args:
        engine: of `deepspeed.initialize`.
        saved: of any engine and number of ranks.
        communicator: of the ranks.

    Raises:
        JobError: on every rank; see `Engine.load_state`.
    """
    with communicator.fail_together():
        check_saved(engine, saved, with_optimizer=True)
    with communicator.fail_together():
        fill(engine, saved, with_optimizer=True)
    publish(engine)
    for name in COUNTERS:
        setattr(engine, name, saved.counters.get(name, 0))
    # From here on updates may have another number of micro-batches.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


@contextmanager
def restart_lost_maximum() -> Iterator[None]:
    """Load universal checkpoints without v̂, which restarts at v as in `ARSG.restart`.

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


def check_saved(engine: Any, saved: SavedState, with_optimizer: bool, *, strict: bool = True) -> None:
    """Compare a saved run with the engine, before anything is changed.

    Args:
        engine: that will load it.
        saved: where from.
        with_optimizer: whether the optimizer's state will be loaded too.
        strict: False lets buffers, frozen parameters, and without the optimizer all parameters be absent: the engine
            keeps its own.

    Raises:
        ValueError: something is missing in it or does not fit.
    """
    grouped, trained = group_names(engine), trained_names(engine)
    parameters, buffers = set(saved.parameters), set(saved.buffers)
    for name, shape in shapes_of(engine).items():
        frozen, absent = name not in trained, name not in parameters
        if absent and not frozen and not with_optimizer and strict:
            raise _absent(saved, "parameter", name)
        if absent and not strict and (frozen or not with_optimizer):
            continue
        _check_parameter(saved, name, shape, frozen=frozen, with_optimizer=with_optimizer)
    for name, buffer in persistent_buffers(engine.module, duplicates=False).items():
        absent = name not in buffers
        if absent and not with_optimizer and strict:
            raise _absent(saved, BUFFER, name)
        if not absent or strict:
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
        lost = needed_state(group) - entries if entries else set()
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


def _absent(saved: SavedState, kind: str, name: str) -> ValueError:
    return ValueError(
        f"{saved.where} has no {kind} {name!r}, which the model has: load_module_strict=False keeps that of the model"
    )


def _check_parameter(
    saved: SavedState, name: str, shape: torch.Size, *, frozen: bool, with_optimizer: bool
) -> None:
    spec = saved.spec(PARAMETER, name)
    if spec is None and frozen:
        raise ValueError(
            f"{saved.where} has no frozen parameter {name!r} of shape {tuple(shape)}, which the model has: if it was "
            "saved with exclude_frozen_parameters=True, load it with load_module_strict=False"
        )
    trained_then = saved.group_of is None or name in saved.group_of
    if spec is None or (with_optimizer and not frozen and not trained_then):
        raise ValueError(
            f"{saved.where} has no parameter {name!r}: it is of another model, or it was frozen then"
        )
    # What DeepSpeed's own converter made of stage 3 is flat.
    if spec.shape != shape and (saved.group_of is not None or spec.numel != shape.numel()):
        raise ValueError(f"{saved.where} has {name!r} in shape {spec.shape}, the model in {tuple(shape)}")


def representative(saved: SavedState, names: list[str]) -> str:
    """Choose the parameter that stands for a group stepped as a whole: one with state."""
    return next((name for name in names if saved.entries(name)), names[0])


def _check_entries(saved: SavedState, index: int, name: str, standard: str) -> None:
    """Refuse a parameter whose state cannot be in one flat state with its group's."""
    entries, wanted = saved.entries(name), saved.entries(standard)
    if not entries and wanted <= {*MOMENTS["amsgrad"], MOVEMENT}:
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


@torch.no_grad()
def fill(engine: Any, saved: SavedState, with_optimizer: bool) -> None:
    """Fill this rank's part of the engine, after `check_saved` and before `publish`.

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
    _load_module(engine, saved)
    if with_optimizer:
        _load_loss_scale(engine.optimizer, saved.loss_scale)
    if restarted and deepspeed.comm.get_rank() == 0:
        warnings.warn(
            f"{saved.where} has lost ARSG's running maximum v̂ (max_exp_avg_sq): it restarts at v, and the run does "
            "not go on as it would have",
            stacklevel=2,
        )


@torch.no_grad()
def follow_weights(engine: Any) -> None:
    """Make the masters, and slow weights, those of the model, where they are not these but for rounding."""
    for shard in shards_of(engine):
        if shard.copy is shard.master:
            continue
        written = shard.copy != shard.master.to(shard.copy.dtype)
        for tensor in (shard.master, shard.state.get("slow_param")):
            if tensor is not None:
                tensor.copy_(torch.where(written, shard.copy.to(tensor.dtype), tensor))


def publish(engine: Any) -> None:
    """Give every rank the whole parameters that the ranks have filled. Collective."""
    publish_copies(engine)
    link_fragments(engine)


def _fill(tensor: Tensor, pieces: list[Piece], saved: SavedState, entry: str) -> None:
    for piece in pieces:
        # Parameters that `check_saved` let be absent stay as they are.
        there = (
            saved.spec(entry, piece.name) is not None
            if entry == PARAMETER
            else entry in saved.entries(piece.name)
        )
        if there:
            write_piece(tensor, piece, saved.read(entry, piece.name, piece.start, piece.numel))


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
    arsg = isinstance(inner_of(optimizer), ARSG)
    restarted = arsg and bool(entries) and "max_exp_avg_sq" in needed_state(shard.group) - entries
    if restarted:
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
    optimizer.state.pop(shard.master, None)
    if state:
        if arsg:
            restore_loaded(state, shard.master, shard.group)
        elif isinstance(state.get("step"), int):  # of a universal checkpoint; torch adds to a tensor in place
            state["step"] = torch.tensor(float(state["step"]))
        optimizer.state[shard.master] = state
    return restarted


def _load_module(engine: Any, saved: SavedState) -> None:
    buffers = persistent_buffers(engine.module, duplicates=False)
    there = (
        (BUFFER, name, buffer) for name, buffer in buffers.items() if saved.spec(BUFFER, name) is not None
    )
    load_tensors(there, saved)
    for name, held, pieces in _frozen_parameters(engine):
        if saved.spec(PARAMETER, name) is None:
            continue
        if pieces is None:
            held.copy_(saved.whole(PARAMETER, name))
        else:
            _fill(held, pieces, saved, PARAMETER)


def _load_loss_scale(wrapper: Any, saved: dict[str, Any] | None) -> None:
    scaler = dynamic_scaler(wrapper)
    if saved is None or scaler is None:
        return
    own = saved if saved.get("kind", LOSS_SCALER) == LOSS_SCALER else {"cur_scale": saved["scale"]}
    for key in SCALER_STATE:
        if key in own and hasattr(scaler, key):
            setattr(scaler, key, own[key])


def link_fragments(engine: Any) -> None:
    """Link parameters to the loaded state, for `safe_get_full_optimizer_state`.

    DeepSpeed links them once, after the first step; loading into an engine that has stepped undoes that for good.
    """
    wrapper, state = engine.optimizer, engine.basic_optimizer.state
    if hasattr(wrapper, "_hp_optimizer_states_linked") and state:
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def _frozen_parameters(engine: Any) -> Iterator[tuple[str, Tensor, list[Piece] | None]]:
    """Yield name and local tensor, and its pieces; None where this is the whole."""
    trained = trained_names(engine)
    for parameter, name in engine.param_names.items():
        if name in trained:
            continue
        if not hasattr(parameter, "ds_id"):
            yield name, parameter, None
            continue
        group = parameter.ds_process_group
        rank, size = deepspeed.comm.get_rank(group=group), deepspeed.comm.get_world_size(group=group)
        yield name, parameter.ds_tensor, pieces_of_each([(name, parameter.ds_numel)], rank, size)


def dynamic_scaler(wrapper: Any) -> Any:
    """Return what keeps the dynamic loss scale of `engine.optimizer`, or None.

    It has the attributes `SCALER_STATE`.
    """
    scaler = loss_scaler(wrapper)
    dynamic = getattr(scaler, "dynamic_loss_scale", getattr(scaler, "dynamic", False))
    return scaler if dynamic else None
