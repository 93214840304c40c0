"""Watch for what goes wrong on one rank without an error."""

import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from arsg_dist.engine import Engine, JobError, all_finite, check_replicas
from arsg_dist.imagenet.config import TrainConfig

_NEVER = 2**62
_NOTICEABLE = 0.2  # seconds between two records; less than that is chance, whatever the ratio


@dataclass(frozen=True)
class RankReport:
    """What one rank saw since the last report.

    Attributes:
        host: its name.
        own_seconds: time for loading and forward passes, in which it waits for no other rank (but under ZeRO stage 3).
        first_nonfinite: update, counted from 1, of its first loss that was NaN or infinite; None if all were finite.
    """

    host: str
    own_seconds: float
    first_nonfinite: int | None


class HealthMonitor:
    """What is not finite, ranks that are slow, weights that differ between ranks.

    Args:
        config: of the run.
        engine: that trains.
    """

    def __init__(self, config: TrainConfig, engine: Engine) -> None:
        self._config, self._engine = config, engine
        self._first_nonfinite = torch.full((), _NEVER, dtype=torch.int64, device=engine.device)
        self._own_seconds = 0.0
        self._events: list[list[Any]] = []
        self._in_a_row = 0
        self._skipped_before = engine.skipped_updates
        self._slow: set[int] = set()
        self._buffers = list(engine.module.buffers())
        self._buffers_before: list[torch.Tensor] = []

    @contextmanager
    def own_time(self) -> Iterator[None]:
        """Time what a rank does by itself."""
        on_cuda = self._engine.device.type == "cuda"
        if on_cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            events[0].record()
        begin = time.perf_counter()
        yield
        if on_cuda:
            events[1].record()
            self._events.append(events)
        else:
            self._own_seconds += time.perf_counter() - begin

    def before_update(self, update: int) -> None:
        """Prepare for an update, counted from 1, before its first backward pass."""
        every = self._config.check_replicas_every
        if every and update % every == 0:
            self._engine.check_next_sums()
        if self._config.on_nonfinite == "skip":
            self._buffers_before = [buffer.clone() for buffer in self._buffers]

    def finite(self, loss: torch.Tensor, update: int) -> torch.Tensor:
        """Return a loss, 0 in place of NaN and infinity, which are noted; wait for none."""
        good = loss.detach().isfinite()
        self._first_nonfinite = torch.minimum(self._first_nonfinite, torch.where(good, _NEVER, update))
        return torch.where(good, loss.detach(), 0)

    def after_update(self, update: int) -> None:
        """Judge the update just made. Collective.

        Raises:
            JobError: on every rank: too many updates without a finite gradient, or weights that differ.
        """
        engine, config = self._engine, self._config
        skipped = engine.skipped_updates - self._skipped_before
        self._skipped_before = engine.skipped_updates
        self._in_a_row = self._in_a_row + skipped if skipped else 0
        if skipped and config.on_nonfinite == "skip":
            # The images or weights that gave no finite gradient may have passed through batch norm's statistics.
            for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
                buffer.copy_(before)
        if self._in_a_row and not engine.loss_scaling:
            if config.on_nonfinite == "stop":
                raise JobError(f"the gradient of update {update} is not finite; {_ADVICE}")
            if self._in_a_row > config.max_skipped_updates:
                raise JobError(
                    f"the gradients of {self._in_a_row} updates one after another, the last of them {update}, are not "
                    f"finite: more than max_skipped_updates={config.max_skipped_updates}"
                )
        if config.check_replicas_every and update % config.check_replicas_every == 0:
            if faults := engine.faulty_sums():
                raise JobError(
                    f"gradients of update {update} were added up wrongly: {'; '.join(faults[:3])}"
                    f"{' ...' if len(faults) > 3 else ''}. Memory, a link or a collective operation corrupted data; "
                    "resume from a checkpoint of before"
                )
            check_replicas(engine.communicator, engine.replicated_tensors(), engine.shards_of_ranks)

    def report(self) -> RankReport:
        """Return what this rank saw since the last report."""
        for begin, end in self._events:
            end.synchronize()
            self._own_seconds += begin.elapsed_time(end) / 1000
        first = int(self._first_nonfinite)
        report = RankReport(socket.gethostname(), self._own_seconds, None if first == _NEVER else first)
        self._events, self._own_seconds = [], 0.0
        self._first_nonfinite.fill_(_NEVER)
        return report

    def judge(self, reports: list[RankReport]) -> list[str]:
        """Say what there is to say about the ranks since the last report.

        Args:
            reports: of all ranks.

        Raises:
            JobError: on every rank: a loss was not finite, and that is to stop the run.
        """
        notes = []
        known = {rank: r.first_nonfinite for rank, r in enumerate(reports) if r.first_nonfinite is not None}
        if known:
            first = min(known.values())
            ranks = ", ".join(f"{rank} ({reports[rank].host})" for rank, at in known.items() if at == first)
            message = f"the loss of update {first} is not finite on rank {ranks}"
            if self._config.on_nonfinite == "stop":
                raise JobError(f"{message}; {_ADVICE}")
            notes.append(f"warning: {message}; its gradient was left out")
        notes += self._stragglers(reports)
        return notes

    def _stragglers(self, reports: list[RankReport]) -> list[str]:
        factor, notes = self._config.straggler_factor, list[str]()
        if not factor or len(reports) == 1 or not any(report.own_seconds for report in reports):
            return notes
        for rank, report in enumerate(reports):
            others = statistics.median(r.own_seconds for other, r in enumerate(reports) if other != rank)
            slow = report.own_seconds > max(factor * others, others + _NOTICEABLE)
            if slow and rank not in self._slow:
                notes.append(
                    f"warning: rank {rank} on {report.host} is slow: it took {report.own_seconds:.2f} s for loading "
                    f"and forward passes where the others took {others:.2f} s; all ranks wait for it"
                )
            elif not slow and rank in self._slow:
                notes.append(f"rank {rank} on {report.host} is as fast as the others again")
            (self._slow.add if slow else self._slow.discard)(rank)
        return notes

    def require_finite_weights(self) -> None:
        """Keep weights that are not finite out of a checkpoint. Collective.

        Raises:
            JobError: on every rank.
        """
        with self._engine.communicator.fail_together():
            if not all_finite(p.detach() for p in self._engine.local_parameters()):
                raise ValueError(f"weights are not finite; no checkpoint was written of them; {_ADVICE}")


_ADVICE = (
    "a smaller learning rate or clip_grad_norm may help; --resume goes on from the last checkpoint, with "
    "--on_nonfinite skip past such updates"
)
