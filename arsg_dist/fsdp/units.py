"""Choose which parts of a network `fully_shard` gathers together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

_ROWS: Final = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

_LAYERS: Final = 3
"""Layers with parameters that a block has at least, where a network has such blocks at all."""
_LARGE: Final = 1 << 20
"""Elements of a layer that is worth gathering by itself, in a network without blocks."""


def units_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find a network's blocks by its structure.

    A block is made of layers, and the network has more than one of its class. What is only a row of such blocks (a
    stage) is no block; its blocks are. Where there are none, it is the children of an `nn.Sequential` or
    `nn.ModuleList` that have a layer inside and a class met more than once in such rows; where there are none of these
    either, large layers; and at last such children of any class. Blocks inside blocks, and blocks with parameters that
    other parts of the network have too, are no units of their own.

    Args:
        module: the network.

    Returns:
        Name and module of each, in the network's order; empty where it has none, and is one unit as a whole.
    """
    units = (
        _outermost(_blocks(module))
        or _outermost(_in_rows(module, 2))
        or _large_layers(module)
        or _outermost(_in_rows(module, 1))
    )
    return _of_themselves(module, units)


def _blocks(module: nn.Module) -> list[tuple[str, nn.Module]]:
    candidates = [
        (name, inner)
        for name, inner in module.named_modules()
        if name and not isinstance(inner, _ROWS) and _layers(inner) >= _LAYERS
    ]
    often = Counter(type(inner) for _, inner in candidates)
    repeated = {name: inner for name, inner in candidates if often[type(inner)] > 1}
    return [(name, inner) for name, inner in repeated.items() if not _is_stage(name, inner, repeated)]


def _is_stage(name: str, module: nn.Module, repeated: Mapping[str, nn.Module]) -> bool:
    """Tell whether most of a module is several blocks of one class, none inside another."""
    inside = [(other, inner) for other, inner in repeated.items() if other.startswith(f"{name}.")]
    of_class: dict[type[nn.Module], list[nn.Module]] = {}
    for _, inner in _outermost(inside):
        of_class.setdefault(type(inner), []).append(inner)
    return any(len(alike) > 1 and 2 * sum(map(_numel, alike)) > _numel(module) for alike in of_class.values())


def _in_rows(module: nn.Module, least: int) -> list[tuple[str, nn.Module]]:
    rows = [
        (f"{name}.{index}" if name else index, child)
        for name, row in module.named_modules()
        if isinstance(row, nn.Sequential | nn.ModuleList)
        for index, child in row.named_children()
        if any(list(inner.parameters(recurse=False)) for inner in list(child.modules())[1:])
    ]
    often = Counter(type(child) for _, child in rows)
    return [
        (name, child) for name, child in rows if often[type(child)] >= least and not isinstance(child, _ROWS)
    ]


def _large_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, inner)
        for name, inner in module.named_modules()
        if name and not list(inner.children()) and _numel(inner) >= _LARGE
    ]


def _outermost(units: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    found = list[tuple[str, nn.Module]]()
    for name, unit in units:
        if not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, unit))
    return found


def _of_themselves(module: nn.Module, units: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Leave out units that share a parameter with another part: `fully_shard` would make two of it."""
    holders: dict[nn.Parameter, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        unit = next((own for own, _ in units if name.startswith(f"{own}.")), "")
        holders.setdefault(parameter, set()).add(unit)
    shared = {unit for of_parameter in holders.values() if len(of_parameter) > 1 for unit in of_parameter}
    return [(name, unit) for name, unit in units if name not in shared]


def _layers(module: nn.Module) -> int:
    return sum(1 for inner in module.modules() if any(True for _ in inner.parameters(recurse=False)))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def recompute_activations(module: nn.Module) -> None:
    """Keep no activations inside units: each is computed again in the backward pass. To be called before `shard`.

    Raises:
        ValueError: the network has no units, or some in which a second forward pass counts twice.
    """
    units = units_of(module)
    if not units:
        raise ValueError(
            "activation checkpointing needs a network with blocks (equal modules in an nn.Sequential or "
            f"nn.ModuleList), and none was found in {type(module).__name__}: leave it out"
        )
    for name, unit in units:
        if counting := _batch_norms(unit):
            raise ValueError(
                f"activation checkpointing computes {name} twice in each update, and the running statistics of its "
                f"{counting[0]} (batch norm) would count every batch twice: leave it out for this network"
            )
    for _, unit in units:
        checkpoint(unit)


def refuse_batch_norm(module: nn.Module) -> None:
    """Raise ValueError for batch norm, whose weights would be bfloat16 beside float32 statistics."""
    if found := _batch_norms(module):
        raise ValueError(
            f"engine_options.param_dtype: bf16 would compute the batch norm {found[0]} with bfloat16 weights beside "
            "its float32 statistics: leave it out for this network; precision: bf16 is autocast then"
        )


def _batch_norms(module: nn.Module) -> list[str]:
    return [
        name for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]


def replicas_of_shards(hosts: Sequence[str]) -> tuple[int, int]:
    """Return the mesh in which each host's ranks share the network: hosts, ranks of each.

    Args:
        hosts: of every rank, in their order.

    Raises:
        ValueError: hosts have different numbers of ranks, ranks of one host do not follow one another, or a host has
            one rank only.
    """
    names = list(dict.fromkeys(hosts))
    each = len(hosts) // len(names)
    if each * len(names) != len(hosts) or list(hosts) != [name for name in names for _ in range(each)]:
        shown = ", ".join(f"{name.partition(' ')[0]} {hosts.count(name)}" for name in names[:8])
        raise ValueError(
            f"shard_group: node needs as many ranks on each host, one host's after the other's; there are {shown}: "
            "start as many on each, or leave it out"
        )
    if each == 1:
        raise ValueError(
            "shard_group: node shards over the ranks of one host, and each host has one rank: leave it out, or use the "
            "engine ddp"
        )
    return len(names), each


def shard(
    module: nn.Module, mesh: DeviceMesh | None = None, *, reshard_after_forward: bool = True, **options: Any
) -> None:
    """Broadcast rank 0's weights, then shard them unit by unit. Collective.

    The parameters become `DTensor`s: make the optimizer over them afterwards.

    Args:
        module: the network, on this rank's device.
        mesh: of the ranks that share it; two-dimensional, with names of its dimensions: replicas of shards (HSDP).
            Default: all ranks share it.
        reshard_after_forward: free a unit's whole parameters after its forward pass, and gather them again for the
            backward pass.
        options: further keyword arguments of `torch.distributed.fsdp.fully_shard`, such as `mp_policy`.

    Raises:
        ValueError: a parameter has no dimension; a part is sharded already; the module is on CPU, and this torch
            cannot shard there.
    """
    sharded = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    if sharded:
        raise ValueError(
            f"{sharded[0]!r} is a DTensor: the network, or a part of it, is sharded already; call fully_shard for the "
            "rest yourself and hand the network to FSDPEngine, or hand over one that is not sharded"
        )
    scalars = [name for name, parameter in module.named_parameters() if not parameter.dim()]
    if scalars:
        raise ValueError(
            f"{scalars[0]!r} has no dimension to be sharded along: make it a parameter of one element, or use the "
            "engine ddp"
        )
    if next(module.parameters()).is_cpu and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(
            f"fully_shard of torch {torch.__version__} does not work on CPU: take a newer torch or a GPU, or use the "
            "engine ddp"
        )
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, 0)
    device = next(module.parameters()).device.type
    mesh = mesh or init_device_mesh(device, (dist.get_world_size(),))
    for _, unit in units_of(module):
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, **options)
