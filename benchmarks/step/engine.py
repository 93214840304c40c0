"""What the file of an engine gives to the driver, and what most engines share: steps of passes and an update."""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.common.kept_results import median_ratio
from benchmarks.common.workloads import WORKLOADS, Workload

Rounds = Sequence[Mapping[str, Any]]
"""What `measure` found in each round, of one optimizer."""


class StepBenchmark(ABC):
    """What the file of an engine gives; `driver` makes jobs, rounds and tables of it.

    A new engine is a subclass in a file beside this one, and a row in `__main__`. The driver has no ranks and reads the
    file too: import the engine's library inside methods only. If its step has one update after the passes, derive from
    `PassesAndUpdate`, which has the columns, and let `stepper` take the times.

    Attributes:
        peers: names of optimizers, in the order of the table.
        baseline: the peer that the others are compared with.
        variant: what measurements differ in beside workload and ranks, "stage" say: heading of the table's first
            column, and with an s the option that chooses among `variants`.
        variants: its values.
        job_per_variant: whether a job can measure one variant only.
        settings: options of this engine alone that all measurements of a table have in common.
        headings: of the columns that `cells` fills, with " | " between them and {baseline} for its name.
        workloads: what can be trained.
    """

    peers: Sequence[str]
    baseline: str
    variant: str
    variants: Sequence[int] | Sequence[str]
    job_per_variant = False
    settings: Sequence[str] = ()
    headings: str
    workloads: Mapping[str, Workload] = WORKLOADS

    @abstractmethod
    def add_options(self, parser: ArgumentParser) -> None:
        """Add options of this engine alone, and set other defaults."""

    @abstractmethod
    def table_name(self, arguments: Namespace) -> str:
        """Return the name of the results' files, without suffix."""

    @abstractmethod
    def launcher(self, device: str, ranks: int, variant: Any) -> list[str]:
        """Return the command that starts ranks on this machine; a module's name and its arguments follow."""

    @abstractmethod
    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the job, and leave it at the end. Collective."""

    @abstractmethod
    def measure(self, peer: str, workload: str, variant: Any, arguments: Namespace) -> dict[str, Any]:
        """Train some steps with one optimizer; numbers for `cells`. Collective."""

    @abstractmethod
    def head(self, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return the report's title, and lines that say what the columns are."""

    @abstractmethod
    def cells(self, peer: str, rounds: Rounds, baseline: Rounds, workload: str, ranks: int) -> list[str]:
        """Return a row of the table, from the name of the optimizer on."""


class PassesAndUpdate(StepBenchmark):
    """An engine whose step is forward and backward passes, then an update in which the optimizer steps.

    `measure` gives `stepper`'s numbers, "state" and "peak" (bytes), "sent" (bytes by operation) and the class's name.

    Attributes:
        traffic: peer → least memory traffic of its step, bytes per fp32 parameter: x, g and the state read, x and the
            state written.
    """

    traffic: Mapping[str, int]
    headings = (
        "optimizer | its own step ms | × {baseline} | by bytes | update ms | × {baseline} | whole step ms "
        "| × {baseline} | state MB/rank | sent MB/rank and step | peak MB/rank"
    )

    def cells(self, peer: str, rounds: Rounds, baseline: Rounds, workload: str, ranks: int) -> list[str]:
        """Return a row of the table, from the name of the optimizer on."""
        last, by_bytes = rounds[-1], self.traffic[peer] / self.traffic[self.baseline]
        times = [
            [f"{median(rounds, key):.1f}", f"{ratio(rounds, baseline, key):.2f}"]
            for key in ("optimizer", "update", "whole")
        ]
        cells = [f"{peer} ({last['class']})", *times[0], f"{by_bytes:.2f}", *times[1], *times[2]]
        cells += [f"{last['state'] / 1e6:.1f}", f"{sum(last['sent'].values()) / 1e6:.1f}"]
        return [*cells, f"{median(rounds, 'peak') / 1e6:.0f}"]


def stepper(
    optimizer: torch.optim.Optimizer, passes: Callable[[], None], update: Callable[[], None], device: str
) -> Callable[[], dict[str, float]]:
    """Return a function that makes one step of passes and update. Collective, over torch's process group.

    It gives milliseconds of the optimizer's own `step` inside the update ("optimizer"), "update" and "whole" step.
    """
    own, step, wait = 0.0, optimizer.step, torch.cuda.synchronize if device == "cuda" else bool

    def now(barrier: Callable[[], object] = bool) -> float:
        wait()
        barrier()
        return 1e3 * time.perf_counter()

    def timed(*positional: Any, **keywords: Any) -> Any:
        nonlocal own
        begin = now()
        result = step(*positional, **keywords)
        own += now() - begin
        return result

    def train() -> dict[str, float]:
        nonlocal own
        begin, own = now(torch.distributed.barrier), 0.0
        passes()
        middle = now(torch.distributed.barrier)
        update()
        end = now(torch.distributed.barrier)
        return {"optimizer": own, "update": end - middle, "whole": end - begin}

    optimizer.step = timed  # type: ignore[method-assign]
    return train


def median(rounds: Rounds, key: str) -> float:
    """Return the median over rounds."""
    return statistics.median(each[key] for each in rounds)


def ratio(ours: Rounds, theirs: Rounds, key: str) -> float:
    """Return the median over rounds of the ratios within a round."""
    return median_ratio([each[key] for each in ours], [each[key] for each in theirs])
