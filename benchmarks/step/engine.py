"""What the file of an engine gives to the driver, and what most engines share: steps of passes and an update."""

from __future__ import annotations

import argparse
import statistics
import time
from abc import ABC, abstractmethod
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

    A new engine is a file beside this one with a subclass, and a row in `__main__`. The driver has no ranks and reads
    the file too: the engine's library is imported inside methods only. If its step has one update after the passes,
    `PassesAndUpdate` has the columns and takes the times.

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
    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add options of this engine alone, and set other defaults."""

    @abstractmethod
    def table_name(self, arguments: argparse.Namespace) -> str:
        """Return the name of the results' files, without suffix."""

    @abstractmethod
    def launcher(self, device: str, ranks: int, variant: Any) -> list[str]:
        """Return the command that starts ranks on this machine; the name of a module and its arguments follow."""

    @abstractmethod
    @contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """Join the job, and leave it at the end. Collective."""

    @abstractmethod
    def measure(
        self, peer: str, workload: str, variant: Any, arguments: argparse.Namespace
    ) -> dict[str, Any]:
        """Make the engine with an optimizer and train some steps; numbers for `cells`. Collective."""

    @abstractmethod
    def head(self, settings: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return the report's title, and lines that say what the columns are."""

    @abstractmethod
    def cells(self, peer: str, rounds: Rounds, baseline: Rounds, workload: str, ranks: int) -> list[str]:
        """Return a row of the table from the name of the optimizer on."""


class PassesAndUpdate(StepBenchmark):
    """An engine whose step is forward and backward passes, then an update in which the optimizer steps.

    `measure` gives what `StepTimer.medians` does, and "state", "peak" (bytes), "sent" (bytes by operation) and "class",
    the optimizer's.

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
        """Return a row of the table from the name of the optimizer on."""
        last = rounds[-1]
        cells = [f"{peer} ({last['class']})"]
        for key in ("optimizer", "update", "whole"):
            cells += [f"{median(rounds, key):.1f}", f"{ratio(rounds, baseline, key):.2f}"]
            if key == "optimizer":
                cells.append(f"{self.traffic[peer] / self.traffic[self.baseline]:.2f}")
        cells += [f"{last['state'] / 1e6:.1f}", f"{sum(last['sent'].values()) / 1e6:.1f}"]
        return [*cells, f"{median(rounds, 'peak') / 1e6:.0f}"]


class StepTimer:
    """Times steps of passes and an update, over torch's process group.

    Args:
        optimizer: its own `step`, inside the update, is timed too.
        passes: forward and backward.
        update: with the communication that belongs to it.
        device: "cpu" or "cuda", which is waited for.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        passes: Callable[[], object],
        update: Callable[[], object],
        device: str,
    ) -> None:
        self._passes, self._update, self._own, step = passes, update, 0.0, optimizer.step
        self._wait = torch.cuda.synchronize if device == "cuda" else bool

        def timed(*positional: Any, **keywords: Any) -> Any:
            begin = self._now()
            result = step(*positional, **keywords)
            self._own += self._now() - begin
            return result

        optimizer.step = timed  # type: ignore[method-assign]

    def step(self) -> tuple[float, float, float]:
        """Make one training step; milliseconds of the optimizer, the update and the whole. Collective."""
        self._meet()
        begin = time.perf_counter()
        self._passes()
        self._meet()
        self._own, middle = 0.0, time.perf_counter()
        self._update()
        self._meet()
        end = time.perf_counter()
        return 1e3 * self._own, 1e3 * (end - middle), 1e3 * (end - begin)

    def medians(self, steps: int) -> dict[str, float]:
        """Return the medians over so many steps. Collective."""
        parts = zip(*(self.step() for _ in range(steps)), strict=True)
        return dict(zip(("optimizer", "update", "whole"), map(statistics.median, parts), strict=True))

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()

    def _meet(self) -> None:
        self._wait()
        torch.distributed.barrier()


def median(rounds: Rounds, key: str) -> float:
    """Return the median over rounds."""
    return statistics.median(each[key] for each in rounds)


def ratio(ours: Rounds, theirs: Rounds, key: str) -> float:
    """Return the median over rounds of the ratios within a round."""
    return median_ratio([each[key] for each in ours], [each[key] for each in theirs])
