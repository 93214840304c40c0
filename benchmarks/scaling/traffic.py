"""What a training step sends and what a rank holds, as part of `model`.

Under ZeRO and replicated it is `arsg_dist.deepspeed.config.explain`, which tests compare with the bytes and messages of
real jobs; for `ShardedOptimizer` it is that optimizer's own layout. Defined here is what the engine ddp sends and holds
with `shard_update` (ddp-sharded), and fsdp, which gathers the parameters again for the backward pass.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from benchmarks.scaling.collectives import Cluster, Exchange, Operation, nodes_of

STRATEGIES = (
    "ddp", "ddp-sharded", "fsdp", "zero1", "zero2", "zero3", "horovod-sharded", "horovod-two-level"
)  # fmt: skip
REUSE_LIMIT = 1e9
"""Elements above which ZeRO-3 gathers parameters again for the backward pass (its stage3_max_reuse_distance)."""


@dataclass(frozen=True)
class Load:
    """What a rank computes.

    Attributes:
        parameters: elements of each trained tensor.
        forward: seconds.
        backward: seconds.
        precision: of the model: "fp32" or "bf16" (with fp32 masters and state).
        bucket: bytes of gradients that travel together.
        units: into which fsdp cuts it, blocks and the rest; 0: as many as there are tensors.
        source: of the figures.
    """

    parameters: tuple[int, ...]
    forward: float
    backward: float
    precision: Literal["fp32", "bf16"] = "fp32"
    bucket: int = 25 << 20
    units: int = 0
    source: str = ""


def zero_config(stage: int, load: Load) -> dict[str, Any]:
    """A DeepSpeed config; stage 0 stands for any replicated data parallelism."""
    size = 2 if load.precision == "bf16" else 4
    zero = {"stage": stage, "reduce_bucket_size": load.bucket // size}
    precision: dict[str, Any] = {"bf16": {"enabled": True}} if load.precision == "bf16" else {}
    optimizer = {"type": "ARSG", "params": {}}
    return {"zero_optimization": zero, "optimizer": optimizer, "gradient_clipping": 0.0} | precision


@cache
def _explained(stage: int, load: Load, ranks: int) -> Any:
    from arsg_dist.deepspeed.config.explain import explain

    explained = explain(zero_config(stage, load), parameters=load.parameters, world_size=ranks)
    assert explained.refused is None, explained.refused
    return explained


def _shards(load: Load, group: int) -> tuple[int, int]:
    """Elements with padding: of all parameters, and of one rank's shard in Horovod's sharded optimizer."""
    import torch

    from arsg_dist.horovod.sharded.buckets import ParameterSpec, plan

    dtype = torch.bfloat16 if load.precision == "bf16" else torch.float32
    specs = [ParameterSpec(str(i), (numel,), (1,), dtype, "cpu") for i, numel in enumerate(load.parameters)]
    layout = plan(specs, group, load.bucket)
    return sum(arena[2] for arena in layout.arenas), sum(bucket.shard_numel for bucket in layout.buckets)


def exchanges(strategy: str, load: Load, cluster: Cluster, ranks: int, gathers: int = 1) -> list[Exchange]:
    """What a step sends.

    Args:
        strategy: of `STRATEGIES`.
        load: with the model's sizes.
        cluster: for the nodes of the two-level form.
        ranks: how many.
        gathers: times that ZeRO-3 gathers the parameters: 1, or 2 if the backward pass gathers again (above
            `REUSE_LIMIT`).
    """
    size = sum(load.parameters) * (2 if load.precision == "bf16" else 4)
    pieces = math.ceil(size / load.bucket)
    if ranks == 1:
        return []
    if strategy.startswith("horovod-"):
        reduce: Operation = "all_to_all" if cluster.reduce_scatter_by_all_to_all else "reduce_scatter"
        _, per_node = nodes_of(cluster, ranks)
        if strategy == "horovod-sharded" or ranks == per_node:
            return [
                Exchange(reduce, size, pieces, "backward"),
                Exchange("all_gather", size, pieces, "forward"),
            ]
        return [
            Exchange(reduce, size, pieces, "backward", "node"),
            Exchange("all_reduce", size // per_node, pieces, "backward", "replicas"),
            Exchange("all_gather", size, pieces, "forward", "node"),
        ]
    if strategy == "ddp-sharded":
        scatter: Operation = "all_to_all" if cluster.two_pass_reduce_scatter else "reduce_scatter"
        return [
            Exchange(scatter, size, pieces, "backward"),
            Exchange("all_gather", size, pieces, "nothing"),
        ]
    if strategy == "fsdp":
        units = load.units or len(load.parameters)
        return [
            Exchange("all_gather", size, units, "forward"),
            Exchange("all_gather", size, units, "backward"),
            Exchange("reduce_scatter", size, units, "backward"),
        ]
    stage = 0 if strategy == "ddp" else int(strategy.removeprefix("zero"))
    found = []
    for message in _explained(stage, load, ranks).communication:
        gradients = message.what == "gradients"
        behind: Any = "backward" if gradients else "forward" if stage == 3 else "nothing"
        found.append(Exchange(message.operation, message.bytes, pieces, behind))
        if not gradients and stage == 3 and gathers == 2:
            found.append(dataclasses.replace(found[-1], behind="backward"))
    return found


def memory(strategy: str, load: Load, cluster: Cluster, ranks: int) -> int:
    """Bytes per rank for parameters, gradients and optimizer state; activations and Horovod's buckets are not in it."""
    held = 2 if load.precision == "bf16" else 4
    masters = 4 if load.precision == "bf16" else 0
    part = math.ceil(sum(load.parameters) / ranks)
    if strategy == "ddp-sharded":
        return 2 * held * sum(load.parameters) + (12 + masters) * part
    if strategy == "fsdp":
        return (2 * held + 12 + masters) * part
    if not strategy.startswith("horovod-"):
        stage = 0 if strategy == "ddp" else int(strategy.removeprefix("zero"))
        return sum(entry.bytes for entry in _explained(stage, load, ranks).memory if entry.where == "device")
    _, per_node = nodes_of(cluster, ranks)
    whole, shard = _shards(load, per_node if strategy == "horovod-two-level" else ranks)
    # parameters; m, v, v̂, masters and the summed gradient, fp32
    return held * whole + (12 + masters + 4) * shard
