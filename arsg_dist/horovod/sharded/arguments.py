"""Check what `ShardedOptimizer` is given."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from arsg_dist.horovod.comm.interface import check_passes, check_predivide_factor
from arsg_dist.optim.by_name import check_element_wise, inner_of

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

sharded_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter → weak reference to the ShardedParameters it belongs to."""


def check_optimizer(optimizer: Any, element_wise: bool) -> None:
    """Refuse an optimizer that cannot be sharded.

    Raises:
        TypeError: not a torch optimizer, or not known to update each element by itself.
        ValueError: a setting that looks across elements or needs gradients of the update.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if hasattr(optimizer, "_handles") or hasattr(optimizer, "_allreduce_delay"):
        raise TypeError("optimizer is already distributed: give the one inside hvd.DistributedOptimizer")
    if not element_wise:
        check_element_wise(
            type(inner_of(optimizer)),
            "use DistributedOptimizer, under which every rank holds them; if it does, give element_wise=True",
        )
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise ValueError("differentiable=True cannot be sharded")
        if group.get("master") == "split":
            raise ValueError(
                "master='split' cannot be sharded: parameters in bfloat16 get sharded fp32 masters here; leave it out"
            )


def check_arguments(
    compression: Any,
    backward_passes_per_step: Any,
    op: Any,
    gradient_predivide_factor: float,
    groups: Any,
    bucket_mb: float,
    gather: str,
) -> None:
    """Refuse settings that cannot be served.

    Raises:
        ValueError: and says which argument.
    """
    check_passes(backward_passes_per_step)
    if op not in (hvd.Average, hvd.Sum):
        raise ValueError("op must be hvd.Average or hvd.Sum; Adasum looks at whole gradients")
    check_predivide_factor(gradient_predivide_factor, op)
    if groups:
        raise ValueError(
            "groups and num_groups have no meaning here: gradients travel in buckets (bucket_mb)"
        )
    if not 0 < bucket_mb < 2048:
        raise ValueError(f"bucket_mb must be > 0 and < 2048, got {bucket_mb}")
    if gather not in ("lazy", "eager"):
        raise ValueError(f"gather must be 'lazy' or 'eager', got {gather!r}")
    probe = torch.arange(8.0)
    compressed, context = compression.compress(probe)
    if compressed.shape != probe.shape or compression.decompress(compressed, context).shape != probe.shape:
        raise ValueError(f"compression {compression} changes the shape of a tensor, so it cannot be sharded")


def check_process_set(process_set: Any) -> None:
    """Refuse ranks that do not train together with this one.

    Raises:
        ValueError: the process set is not registered with Horovod, or this rank is not in it.
    """
    if process_set.process_set_id is None:
        raise ValueError(
            f"process_set {process_set} is not registered: give it to hvd.init(process_sets=[...]), or start the job "
            "with HOROVOD_DYNAMIC_PROCESS_SETS=1 and call hvd.add_process_set(...) on every rank"
        )
    if not process_set.included():
        raise ValueError(
            f"rank {hvd.rank()} is not in process_set {process_set}: construct ShardedOptimizer on its ranks only"
        )


def check_elastic(shard_group: str | int, process_set: Any) -> None:
    """Refuse shards over a part of the ranks where ranks come and go.

    Raises:
        ValueError: shards are not over all ranks.
    """
    if shard_group != "job" or process_set.process_set_id != 0:
        raise ValueError(
            "an elastic job needs shards over all its ranks: leave shard_group and process_set at their defaults"
        )


def given_names(named_parameters: Iterable[tuple[str, Tensor]] | None) -> dict[Tensor, str] | None:
    """Map parameters to their first names, in the order they were named in.

    Raises:
        ValueError: a name is used twice, or something is not a pair.
    """
    if named_parameters is None:
        return None
    pairs = list(named_parameters)
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ValueError("named_parameters must be (name, parameter) pairs, as of model.named_parameters()")
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"names in named_parameters must be unique, found twice: {', '.join(twice)}")
    names: dict[Tensor, str] = {}
    for name, parameter in pairs:
        names.setdefault(parameter, name)
    return names


def names_of(param_groups: list[dict[str, Any]], given: dict[Tensor, str] | None) -> list[tuple[str, Tensor]]:
    """List the optimizer's parameters with names, in the order they were named in.

    Raises:
        ValueError: a name is missing.
    """
    named = [
        pair for index, group in enumerate(param_groups) for pair in names_of_group(group, index, given or {})
    ]
    if given is None:
        return named
    wanted = {parameter for _, parameter in named}
    if missing := wanted - given.keys():
        raise ValueError(f"named_parameters has no name for {len(missing)} of the optimizer's parameters")
    return [(name, parameter) for parameter, name in given.items() if parameter in wanted]


def names_of_group(group: dict[str, Any], index: int, given: dict[Tensor, str]) -> list[tuple[str, Tensor]]:
    """List a group's parameters with names: those given, else its own, else numbers."""
    own = group.get("param_names") or [f"group{index}.{number}" for number in range(len(group["params"]))]
    return [
        (given.get(parameter, name), parameter) for name, parameter in zip(own, group["params"], strict=True)
    ]


def check_parameters(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that cannot lie in flat memory.

    Raises:
        ValueError: and says which parameter and why.
    """
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        if type(parameter) not in (torch.Tensor, torch.nn.Parameter) or parameter.layout != torch.strided:
            raise ValueError(
                f"{name} is a {type(parameter).__name__} ({parameter.layout}), not a dense tensor"
            )
        if parameter.dtype not in _DTYPES:
            raise ValueError(
                f"{name} is {parameter.dtype}; only {', '.join(map(str, _DTYPES))} can be sharded"
            )
        if isinstance(parameter.grad, Tensor) and parameter.grad.layout != torch.strided:
            raise ValueError(f"{name} has a sparse gradient, which cannot be sharded")
        if _is_sharded(parameter):
            gc.collect()  # one that was dropped may still be there on some ranks
        if _is_sharded(parameter):
            raise ValueError(f"{name} already belongs to a ShardedOptimizer: call its close() first")


def _is_sharded(parameter: Tensor) -> bool:
    owner: weakref.ref[Any] | None = sharded_by.get(parameter)  # type: ignore[no-untyped-call]
    return owner is not None and owner() is not None
