"""What a running DeepSpeed engine contributes to a portable checkpoint, under any ZeRO stage and precision."""

from typing import Any, Final

from torch import Tensor

from arsg_dist.deepspeed.shards import (
    LOSS_SCALER,
    SCALER_STATE,
    Shard,
    dynamic_scaler,
    frozen_pieces,
    group_names,
    persistent_buffers,
    shapes_of,
    shards_of,
)
from arsg_dist.engine.replicated_state import aliases_of
from arsg_dist.engine.state import (
    BUFFER,
    PARAMETER,
    EngineState,
    Group,
    TensorSpec,
    key_of,
    plain_settings,
    state_numbers,
    state_tensors,
)

COUNTERS: Final = ("global_steps", "global_samples", "skipped_steps")


def engine_state(engine: Any, rank: int, world_size: int) -> EngineState:
    """This rank's part of a DeepSpeed engine.

    Args:
        engine: of `deepspeed.initialize`.
        rank: of this process in the job.
        world_size: ranks of the job, which share the writing of what all hold alike.

    Raises:
        ValueError: experts, NVMe, or state of a kind that is not saved.
    """
    shards, grouped = list(shards_of(engine)), group_names(engine)
    shapes = {name: tuple(shape) for name, shape in shapes_of(engine).items()}
    state = EngineState("deepspeed", aliases=aliases_of(engine.module, engine.param_names))
    state.groups = [
        Group(plain_settings(group), names)
        for group, names in zip(engine.basic_optimizer.param_groups, grouped, strict=True)
    ]
    replicated: dict[str, Tensor] = {}
    for shard in shards:
        _add_shard(state, shard, shapes, replicated)
    trained = {name for names in grouped for name in names}
    for parameter, name in engine.param_names.items():
        key = key_of(PARAMETER, name)
        if name in trained:
            continue
        if not hasattr(parameter, "ds_id"):
            replicated[key] = parameter
            continue
        for piece in frozen_pieces(parameter, name):
            spec = TensorSpec(parameter.dtype, shapes[name])
            state.add(key, spec, piece.start, piece.numel, parameter.ds_tensor, piece.offset)
    state.add_replicated(replicated, rank, world_size)
    if rank == 0:  # batch norm's differ between ranks
        for name, buffer in persistent_buffers(engine):
            state.add_whole(key_of(BUFFER, name), buffer)
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
