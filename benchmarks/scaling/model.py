"""The time of a training step. What it says is a prediction, not a measurement.

A step takes forward + backward + update + overhead + what of the communication is not hidden: of the exchanges that can
run behind a pass, `overlap` × (the shorter of the two) is hidden. How long an exchange takes alone: `collectives`. What
is sent and held: `traffic`. What the model is asked about: `inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scaling.collectives import Cluster, nodes_of, seconds
from benchmarks.scaling.traffic import REUSE_LIMIT, Load, exchanges


@dataclass(frozen=True)
class Behaviour:
    """Attributes: overhead: seconds per step; overlap: share of what could be hidden that is, 0 to 1."""

    overhead: float = 0.0
    overlap: float = 0.0


def update_seconds(strategy: str, load: Load, cluster: Cluster, ranks: int) -> float:
    """Return the time of the optimizer alone: 36 bytes per element that the rank updates, at the memory's bandwidth."""
    if not cluster.memory_bandwidth:
        return 0.0
    group = nodes_of(cluster, ranks)[1] if strategy == "horovod-two-level" else ranks
    share = 1 if strategy == "ddp" else group
    return 36 * sum(load.parameters) / share / cluster.memory_bandwidth


def alone_seconds(load: Load, cluster: Cluster) -> float:
    """Return the time of a step on one rank."""
    return load.forward + load.backward + update_seconds("ddp", load, cluster, 1)


def step_range(strategy: str, load: Load, cluster: Cluster, ranks: int) -> list[float]:
    """Return the times of a step with all hidden that can be, and with nothing hidden."""
    gathers = 2 if sum(load.parameters) > REUSE_LIMIT else 1
    return [
        step_seconds(strategy, load, cluster, ranks, Behaviour(0.0, hidden), gathers) for hidden in (1, 0)
    ]


def step_seconds(
    strategy: str, load: Load, cluster: Cluster, ranks: int, behaviour: Behaviour, gathers: int = 1
) -> float:
    """Return the time of a training step."""
    total = load.forward + load.backward + behaviour.overhead + update_seconds(strategy, load, cluster, ranks)
    exposed, hideable = communication(strategy, load, cluster, ranks, gathers)
    return total + exposed - behaviour.overlap * hideable


def communication(
    strategy: str, load: Load, cluster: Cluster, ranks: int, gathers: int = 1
) -> tuple[float, float]:
    """Return the seconds of all exchanges, and of them the most that could be hidden behind the passes."""
    times = {"forward": 0.0, "backward": 0.0, "nothing": 0.0}
    for exchange in exchanges(strategy, load, cluster, ranks, gathers):
        times[exchange.behind] += seconds(cluster, exchange, ranks)
    hideable = min(times["forward"], load.forward) + min(times["backward"], load.backward)
    return sum(times.values()), hideable
