"""Broadcast parameters and optimizer state, for every dtype, without a step."""

from collections.abc import Callable, Iterator
from typing import Any

import horovod.torch as hvd
import horovod.torch.elastic.state as elastic_state
import horovod.torch.functions as functions
import torch
from torch import Tensor
from torch.optim import Optimizer

from arsg_dist.horovod.comm.process_groups import Group
from arsg_dist.horovod.leaving import join, shutdown
from arsg_dist.horovod.replicated.optimizer import ReplicatedOptimizer
from arsg_dist.optim.by_name import OURS

_horovod_parameters: Callable[..., None] = functions.broadcast_parameters
_horovod_state: Callable[..., None] = functions.broadcast_optimizer_state

# Types that every backend of Horovod copies, NCCL too; the bits do not matter to a copy.
_CARRIERS = {1: torch.uint8, 2: torch.float16, 4: torch.int32, 8: torch.int64}


def register() -> None:
    """Replace Horovod's broadcasts of parameters and state, `join` and `shutdown`.

    Horovod's broadcasts (0.28.1) refuse bfloat16 and tensors that are not contiguous, and make a real step where an
    optimizer has no state yet; after its `join` a `ShardedOptimizer` crashes, and its `shutdown` cuts off the
    parameters on their way (`leaving`). Names imported from Horovod before (`from horovod.torch import
    broadcast_optimizer_state`) stay Horovod's. Calling this again changes nothing.
    """
    for module in (hvd, functions, elastic_state):
        module.broadcast_parameters = broadcast_parameters
        module.broadcast_optimizer_state = broadcast_optimizer_state
    hvd.join = join
    hvd.shutdown = shutdown


def broadcast_parameters(params: Any, root_rank: int = 0) -> None:
    """Broadcast one rank's tensors in place, bit by bit. Collective.

    Args:
        params: `model.state_dict()`, or a list of tensors or (name, tensor).
        root_rank: the rank they come from.

    Raises:
        ValueError: `params` is something else.
    """
    if isinstance(params, dict):
        pairs = sorted(params.items())
    elif isinstance(params, list):
        pairs = [pair if isinstance(pair, tuple) else (None, pair) for pair in params]
    else:
        raise ValueError(
            f"params must be a state_dict or a list of (named) tensors, got {type(params).__name__}"
        )
    for name, tensor in pairs:
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name} is no tensor but a {type(tensor).__name__}: leave it out and use hvd.broadcast_object"
            )
    carried = [(name, _carrier(tensor)) for name, tensor in pairs]
    _horovod_parameters(carried, root_rank)
    with torch.no_grad():
        for (_, tensor), (_, bits) in zip(pairs, carried, strict=True):
            _unload(bits, tensor)


def broadcast_optimizer_state(optimizer: Optimizer, root_rank: int = 0, model: Any = None) -> None:
    """Broadcast one rank's optimizer settings and state. Collective.

    That is learning rates, moments, maxima, step counts. For `ARSG`, `RemoteObservation` and optimizers wrapped by
    `arsg_dist.horovod.DistributedOptimizer`; others go Horovod's way. Nothing is stepped: state that `root_rank` does
    not have is dropped elsewhere, state that others lack is created.

    Args:
        optimizer: with the same parameters on every rank.
        root_rank: the rank the state comes from.
        model: passed on to Horovod for other optimizers.

    Raises:
        ValueError: the ranks' optimizers have other groups or numbers of parameters (on every rank alike).
        TypeError: on every rank: a setting or an entry of the state is of a kind that `engine.messages` does not send.
    """
    if not isinstance(optimizer, (*OURS, ReplicatedOptimizer)):
        _horovod_state(optimizer, root_rank, model)
        return
    shapes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    ranks = Group(name="arsg_dist")
    shapes_of = ranks.all_gather_object(shapes, "optimizer_shapes")
    if any(other != shapes_of[root_rank] for other in shapes_of):
        raise ValueError(
            "the optimizers of the ranks have different parameter groups or parameters: build them alike on every rank"
        )
    mine: Any = None
    if ranks.rank == root_rank:
        mine = (
            [_portable(group) for group in optimizer.param_groups],
            [_described(optimizer.state.get(p, {})) for p in _parameters(optimizer)],
        )
    groups, described = ranks.all_gather_object(mine, "optimizer_state")[root_rank]
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        _assign_options(group, options)
    tensors = []
    for index, (parameter, entry) in enumerate(zip(_parameters(optimizer), described, strict=True)):
        if not entry:
            optimizer.state.pop(parameter, None)
            continue
        state = optimizer.state[parameter]
        for name in set(state) - set(entry):
            del state[name]
        for name, value in entry.items():
            if value[0] == "tensor":
                state[name] = _tensor_like(state.get(name), parameter, *value[1:])
                tensors.append((f"{index}.{name}", state[name]))
            else:
                state[name] = value[1]
    broadcast_parameters(tensors, root_rank)


def _described(state: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Describe state: ("tensor", shape, dtype, on the CPU?) or ("other", value)."""
    return {
        name: ("tensor", tuple(value.shape), value.dtype, value.is_cpu)
        if isinstance(value, Tensor)
        else ("other", value)
        for name, value in state.items()
    }


def _tensor_like(
    present: Any, parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype, on_cpu: bool
) -> Tensor:
    """Return the present tensor if it fits, else a new one in the parameter's layout."""
    device = torch.device("cpu") if on_cpu else parameter.device
    if isinstance(present, Tensor) and (tuple(present.shape), present.dtype, present.device) == (
        shape,
        dtype,
        device,
    ):
        return present
    if shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, device=device, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=device)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _portable(group: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name != "params"
    }


def _assign_options(group: dict[str, Any], options: dict[str, Any]) -> None:
    """Assign settings; tensors keep their identity, which schedulers hold on to."""
    for name, value in options.items():
        present = group.get(name)
        if isinstance(value, Tensor) and isinstance(present, Tensor):
            present.copy_(value)
        else:
            group[name] = value


def _carrier(tensor: Tensor) -> Tensor:
    """View or copy a tensor's bits, flat, of a type that Horovod copies."""
    flat = tensor.detach()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    return flat.contiguous().reshape(-1).view(_CARRIERS[flat.element_size()])


def _unload(bits: Tensor, tensor: Tensor) -> None:
    """Write a carrier's bits back where it does not share the tensor's memory."""
    target = tensor.detach()
    if target.is_complex():
        target = torch.view_as_real(target)
    if bits.numel() and bits.data_ptr() != target.data_ptr():
        target.copy_(bits.view(target.dtype).reshape(target.shape))
