"""Show a running training: rates, waiting for data, time left, records."""

import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from arsg_dist.imagenet.output.run_log import RunLog
from arsg_dist.imagenet.training.metrics import Evaluation

T = TypeVar("T")


@dataclass
class Stretch:
    """A stretch of training on this rank.

    Attributes:
        started: `time.perf_counter()` at its start.
        images: of this rank.
        waited: seconds spent waiting for the loader.
    """

    started: float
    images: int = 0
    waited: float = 0.0

    def seconds(self) -> float:
        """Return how long it lasts."""
        return time.perf_counter() - self.started


class Progress:
    """Progress bar, speed and records of a run; only rank 0 shows and writes.

    Args:
        log: the run's records, on rank 0 only.
        rank: of this process.
        world_size: number of ranks.
        total_updates: weight updates of the whole run.
        first_update: updates made before this start.
        batch_size: images per update over all ranks.
    """

    def __init__(
        self,
        log: RunLog | None,
        *,
        rank: int,
        world_size: int,
        total_updates: int,
        first_update: int,
        batch_size: int,
    ) -> None:
        self.log = log
        self._leader = rank == 0
        self._world_size = world_size
        self._total_updates, self._first_update = total_updates, first_update
        self._batch_size = batch_size
        self._started = time.perf_counter()
        self._bar: Any = None
        self._recent = self._epoch = Stretch(self._started)

    def begin_epoch(self, title: str, updates: int) -> None:
        """Start the bar and the clocks of an epoch of so many updates."""
        self._bar = tqdm(
            total=updates * self._batch_size,
            unit=" images",
            desc=title,
            disable=not self._leader,
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5 if os.isatty(2) else 10,
        )
        now = time.perf_counter()
        self._recent, self._epoch = Stretch(now), Stretch(now)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Time how long each `next` takes: the longest that a GPU can have stood still."""
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            waited = time.perf_counter() - begin
            self._recent.waited += waited
            self._epoch.waited += waited
            yield batch

    def updated(self) -> None:
        """Count a weight update."""
        self._bar.update(self._batch_size)
        self._recent.images += self._batch_size // self._world_size
        self._epoch.images += self._batch_size // self._world_size

    def waited_share(self) -> float:
        """Return the share of time since the last record that data took, 0 … 1."""
        return self._recent.waited / max(self._recent.seconds(), 1e-9)

    def record(
        self,
        update: int,
        loss: float,
        hyperparameters: dict[str, float],
        waited: list[float],
        *,
        skipped: int = 0,
    ) -> None:
        """Write a training record and refresh the bar.

        Args:
            update: weight updates made so far.
            loss: mean training loss since the last record, over all ranks.
            hyperparameters: lr, mu, as shown.
            waited: `waited_share()` of every rank; the largest is recorded.
            skipped: updates of this start that were left out, since their gradient was not finite.
        """
        values = {"loss": loss, **self._speed(self._recent), "data_wait_share": max(waited)}
        if skipped:
            values["skipped_updates"] = skipped
        if self.log:
            self.log.write("train", update, {**values, **hyperparameters})
        self._bar.set_postfix(
            {
                "loss": f"{loss:.3f}",
                **{key: f"{value:.4g}" for key, value in hyperparameters.items()},
                "per rank": f"{values['images_per_second_per_rank']:,.0f}/s",
                "data wait": f"{max(waited):.0%}",
                "run ends in": _duration(self.seconds_left(update)),
            }
        )
        self._recent = Stretch(time.perf_counter())

    def seconds_left(self, update: int) -> float:
        """Return the seconds to the run's end at this start's pace; NaN if unknown."""
        done = update - self._first_update
        pace = (time.perf_counter() - self._started) / done if done else math.nan
        return pace * (self._total_updates - update)

    def end_epoch(self) -> dict[str, float]:
        """Close the bar; return speed over the epoch and this rank's waiting share."""
        self._bar.close()
        share = self._epoch.waited / max(self._epoch.seconds(), 1e-9)
        return {**self._speed(self._epoch), "data_wait_share": share}

    def epoch(
        self,
        update: int,
        *,
        epoch: int,
        train_loss: float,
        evaluation: Evaluation,
        ema: Evaluation | None,
        speed: dict[str, float],
        hyperparameters: dict[str, float],
        bad_images: int,
        image_size: int,
    ) -> None:
        """Write and show the record of a finished epoch (counted from 1)."""
        if not self.log:
            return
        values = {
            "epoch": epoch,
            "train_loss": train_loss,
            **_prefixed("val", evaluation),
            **(_prefixed("ema_val", ema) if ema else {}),
            **speed,
            "bad_images": bad_images,
            "image_size": image_size,
            **hyperparameters,
        }
        self.log.write("epoch", update, values)
        self.say(
            f"epoch {epoch:3d}  train loss {train_loss:.4f}  val loss {evaluation.loss:.4f}  "
            f"top-1 {evaluation.top1:7.2%}  top-5 {evaluation.top5:7.2%}  "
            + (f"EMA top-1 {ema.top1:7.2%}  " if ema else "")
            + f"{speed['images_per_second']:,.0f} images/s  data wait {speed['data_wait_share']:.0%}  "
            + "  ".join(f"{key} {value:.4g}" for key, value in hyperparameters.items())
        )

    def say(self, message: str) -> None:
        """Print a line beside the bar, on rank 0."""
        if self._leader:
            tqdm.write(message)

    def _speed(self, stretch: Stretch) -> dict[str, float]:
        per_rank = stretch.images / max(stretch.seconds(), 1e-9)
        return {"images_per_second": per_rank * self._world_size, "images_per_second_per_rank": per_rank}


def _prefixed(prefix: str, evaluation: Evaluation) -> dict[str, float]:
    return {
        f"{prefix}_loss": evaluation.loss,
        f"{prefix}_top1": evaluation.top1,
        f"{prefix}_top5": evaluation.top5,
        f"{prefix}_images": evaluation.images,
    }


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    return str(tqdm.format_interval(seconds))
