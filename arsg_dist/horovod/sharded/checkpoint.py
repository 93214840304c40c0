"""Save and load the pieces of a ShardedOptimizer: no rank holds more than its own."""

from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist.engine.replicated_state import (
    add_buffers,
    aliases_of,
    check_model,
    load_tensors,
    named_groups,
    parameter_names,
    persistent_buffers,
)
from arsg_dist.engine.saved_state import SavedState
from arsg_dist.engine.state import (
    BUFFER,
    PARAMETER,
    EngineState,
    TensorSpec,
    key_of,
    order_of,
    restore_settings,
    state_numbers,
    state_tensors,
)
from arsg_dist.horovod.sharded.buckets import ParameterSpec, Segment
from arsg_dist.horovod.sharded.optimizer import ShardedOptimizer


def sharded_engine_state(
    module: nn.Module, optimizer: ShardedOptimizer, rank: int, world_size: int
) -> EngineState:
    """Offer this rank's part of a model and its sharded optimizer. Collective.

    Args:
        module: the model, whole on every rank.
        optimizer: over its parameters.
        rank: of this process in the job.
        world_size: ranks of the job, which share the writing of what all hold alike.

    Raises:
        ValueError: state of a kind that is not saved.
    """
    shards, inner = optimizer.shards, optimizer.inner
    shards.require_layout("state()")
    shards.update_masters()
    names = parameter_names(module, optimizer)
    state = EngineState(
        "horovod-sharded", groups=named_groups(optimizer, names), aliases=aliases_of(module, names)
    )
    if shards.groups.holds_first_copy:
        for spec, segment, piece in shards.pieces:
            held = inner.state.get(piece, {})
            if numbers := state_numbers(spec.name, held):
                state.numbers[spec.name] = numbers
            for entry, tensor in {PARAMETER: piece, **dict(state_tensors(held))}.items():
                if tensor.shape != piece.shape:
                    raise ValueError(
                        f"the optimizer keeps {entry!r} of {spec.name!r} in another shape: it is not saved"
                    )
                stored = TensorSpec(tensor.dtype, spec.shape, order_of(spec.stride, spec.shape))
                state.add(key_of(entry, spec.name), stored, segment.parameter_start, segment.numel, tensor, 0)
    trained = {spec.name for spec in shards.specs if spec.numel}
    replicated: dict[str, Tensor] = {
        key_of(PARAMETER, name): parameter for parameter, name in names.items() if name not in trained
    }
    state.add_replicated(replicated, rank, world_size)
    add_buffers(state, module, rank)
    return state


@torch.no_grad()
def load_sharded(module: nn.Module, optimizer: ShardedOptimizer, saved: SavedState) -> None:
    """Fill this rank's pieces and what every rank holds; then `publish_masters`.

    Raises:
        ValueError: the saved run does not fit, found before anything changes; or a file is damaged.
        RuntimeError: in the middle of an update.
    """
    shards = optimizer.shards
    shards.refuse_in_update("load_state()")
    names = parameter_names(module, optimizer)
    check_model(module, saved)
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        members = [names[parameter] for parameter in group["params"]]
        restore_settings(settings, saved.settings_for(members, index, len(optimizer.param_groups)))
        groups.append(settings)
    optimizer.synchronize_parameters()
    loaded: dict[Tensor, dict[str, Any]] = {}
    for spec, segment, piece in shards.pieces:
        order = order_of(spec.stride, spec.shape)

        def part(
            entry: str, spec: ParameterSpec = spec, segment: Segment = segment, order: tuple[int, ...] = order
        ) -> Tensor:
            return saved.read(entry, spec.name, segment.parameter_start, segment.numel, order)

        piece.copy_(part(PARAMETER))
        loaded[piece] = {}
        for entry in sorted(saved.entries(spec.name)):
            kept = saved.spec(entry, spec.name)
            if kept is not None and kept.shape != spec.shape:
                raise ValueError(
                    f"{saved.where} has {entry!r} of {spec.name!r} in shape {kept.shape}: it cannot be sharded"
                )
            loaded[piece][entry] = (
                saved.number(spec.name, entry) if kept is None else part(entry).to(piece.device, copy=True)
            )
    trained = {spec.name for spec in shards.specs if spec.numel}
    whole = [(PARAMETER, name, parameter) for parameter, name in names.items() if name not in trained]
    load_tensors(whole, saved)
    load_tensors(((BUFFER, name, buffer) for name, buffer in persistent_buffers(module).items()), saved)
    optimizer.inner.load(groups, loaded, {})
    shards.take_gradients_back()
