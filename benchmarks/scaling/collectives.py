"""How long a collective takes, as part of `model`.

On `size` bytes over n ranks it costs (hops × latency) + (bytes on the fullest link / its bandwidth) + (bytes sent ×
handling), the last being work of processors that does not depend on the link. Rings send size × (n−1)/n per rank and
pass, in n−1 hops; an all-reduce makes two passes (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). Of the hops
of a ring as many are between nodes as there are nodes, less one (as in NCCL's own model, its src/graph/tuning.cc).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Operation = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]


@dataclass(frozen=True)
class Link:
    """Attributes: latency: seconds per hop; bandwidth: bytes per second in one direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """How a library's collective differs from the links' own figures.

    Attributes:
        latency: seconds per hop beside the link's.
        slowdown: factor on the time on the link, ≥ 1 as a rule.
        handling: seconds per byte a rank sends, at one rank per core.
    """

    latency: float = 0.0
    slowdown: float = 1.0
    handling: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Nodes with the same number of ranks.

    Attributes:
        ranks_per_node: at most; smaller jobs fill one node in part.
        inside: between two ranks of a node; the bandwidth is a rank's.
        between: between two nodes; the bandwidth is a node's, all its adapters together.
        costs: per operation, default none.
        cores: that all ranks of the job share; None: every rank has its own.
        two_pass_reduce_scatter: it is made as an all-reduce, of which a part is kept (torch's gloo).
        reduce_scatter_by_all_to_all: in Horovod's sharded optimizer, as it does on CPU.
        trees: all-reduces may run over trees instead of rings: fewer hops, the same bytes.
        memory: bytes per rank, for marking what does not fit.
        memory_bandwidth: bytes per second, for the update; 0: the update is in the overhead.
        source: of the figures.
    """

    ranks_per_node: int
    inside: Link
    between: Link
    costs: Mapping[str, Cost] = field(default_factory=dict)
    cores: int | None = None
    two_pass_reduce_scatter: bool = False
    reduce_scatter_by_all_to_all: bool = False
    trees: bool = False
    memory: float = math.inf
    memory_bandwidth: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Exchange:
    """One kind of collective in a step.

    Attributes:
        operation: see `Operation`.
        size: bytes of the whole data, all pieces together.
        pieces: into which it is cut.
        behind: the pass it can run behind.
        among: the ranks that take part: of the job, of a node, or one of each node.
    """

    operation: Operation
    size: int
    pieces: int
    behind: Literal["forward", "backward", "nothing"]
    among: Literal["job", "node", "replicas"] = "job"


def nodes_of(cluster: Cluster, ranks: int) -> tuple[int, int]:
    """Number of nodes, and ranks on each.

    Raises:
        ValueError: the ranks do not fill their nodes.
    """
    per_node = min(ranks, cluster.ranks_per_node)
    if ranks < 1 or ranks % per_node:
        raise ValueError(f"{ranks} ranks do not fill nodes of {cluster.ranks_per_node}")
    return ranks // per_node, per_node


def sent_by_rank(operation: Operation, size: float, ranks: int) -> float:
    """Bytes; of a ring, or of an all-to-all in which every rank has `size` bytes to send to all, itself included."""
    passes = 2 if operation == "all_reduce" else 1
    return passes * size * (ranks - 1) / ranks


def features(cluster: Cluster, exchange: Exchange, ranks: int) -> tuple[float, float, float, float]:
    """What a collective's time is linear in: seconds of the links' latency, hops, seconds on the links, bytes handled.

    The time is the first + latency × the second + slowdown × the third + handling × the fourth, with `Cost`'s figures.
    """
    nodes, per_node = nodes_of(cluster, ranks)
    if exchange.among == "node":
        nodes = 1
    parallel = 1  # rings that share a node's adapters
    if exchange.among == "replicas":
        parallel, per_node = per_node, 1
    taking_part = nodes * per_node
    if taking_part == 1:
        return 0.0, 0.0, 0.0, 0.0
    operation: Operation = exchange.operation
    if operation == "reduce_scatter" and cluster.two_pass_reduce_scatter:
        operation = "all_reduce"
    sent = sent_by_rank(operation, exchange.size, taking_part)
    passes = 2 if operation == "all_reduce" else 1
    if operation == "all_to_all":
        inside, between = (
            sent * (per_node - 1) / (taking_part - 1),
            per_node * exchange.size * (nodes - 1) / nodes,
        )
        hops_between = taking_part - per_node
    else:
        inside, between = sent if per_node > 1 else 0.0, sent if nodes > 1 else 0.0
        hops_between = passes * (nodes - 1)
    hops = passes * (taking_part - 1)
    if cluster.trees and operation == "all_reduce" and nodes > 1:
        hops_between = min(hops_between, 2 * math.ceil(math.log2(nodes)))
        hops = min(hops, 2 * (per_node - 1) + hops_between)
    latency = (hops - hops_between) * cluster.inside.latency + hops_between * cluster.between.latency
    on_links = max(inside / cluster.inside.bandwidth, parallel * between / cluster.between.bandwidth)
    crowd = 1.0 if cluster.cores is None else max(1.0, ranks / cluster.cores)
    return exchange.pieces * latency, exchange.pieces * hops, on_links, sent * crowd


def seconds(cluster: Cluster, exchange: Exchange, ranks: int) -> float:
    """Time of an exchange when nothing else runs."""
    cost = cluster.costs.get(exchange.operation, Cost())
    latency, hops, on_links, handled = features(cluster, exchange, ranks)
    return latency + cost.latency * hops + cost.slowdown * on_links + cost.handling * handled
