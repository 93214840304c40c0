"""Choose which parts of a network `fully_shard` gathers together."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard


def units_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find a network's blocks: equal modules in a row, as in transformers.

    A block is a child of an `nn.Sequential` or `nn.ModuleList` that has parameters in modules of its own, and whose
    class the network has more than once in such rows. Blocks inside blocks are not units of their own.

    Args:
        module: the network.

    Returns:
        Name and module of each, in the network's order; empty where it has none, and is one unit as a whole.
    """
    rows = [
        (f"{name}.{index}" if name else index, child)
        for name, row in module.named_modules()
        if isinstance(row, nn.Sequential | nn.ModuleList)
        for index, child in row.named_children()
        if any(list(inner.parameters(recurse=False)) for inner in list(child.modules())[1:])
    ]
    often = Counter(type(child) for _, child in rows)
    units = list[tuple[str, nn.Module]]()
    for name, child in rows:
        inside = any(name.startswith(f"{outer}.") for outer, _ in units)
        if often[type(child)] > 1 and not isinstance(child, nn.Sequential | nn.ModuleList) and not inside:
            units.append((name, child))
    return units


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
        counting = [
            inner for inner, part in unit.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
        ]
        if counting:
            raise ValueError(
                f"activation checkpointing computes {name} twice in each update, and the running statistics of its "
                f"{counting[0]} (batch norm) would count every batch twice: leave it out for this network"
            )
    for _, unit in units:
        checkpoint(unit)


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
        ValueError: a parameter has no dimension; the module is on CPU, and this torch cannot shard there.
    """
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
