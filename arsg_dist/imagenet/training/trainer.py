"""Train epoch by epoch, from one start of a run to its end or a signal."""

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arsg_dist.engine.job import PREEMPTED
from arsg_dist.imagenet.data.builtin import DIGITS
from arsg_dist.imagenet.data.dataset import Batch, batches
from arsg_dist.imagenet.data.sampler import IGNORED
from arsg_dist.imagenet.data.transforms import cross_entropy_sum, train_size
from arsg_dist.imagenet.models import weighted_logits
from arsg_dist.imagenet.output.export import write_model_card
from arsg_dist.imagenet.output.run_directory import CHECKPOINTS, TENSORBOARD, WEIGHTS
from arsg_dist.imagenet.output.run_log import RunLog
from arsg_dist.imagenet.output.states import keep_earlier_records
from arsg_dist.imagenet.output.weights import EMA, LAST, WeightFiles
from arsg_dist.imagenet.signals import MARKER, write_marker
from arsg_dist.imagenet.training.checkpoint import Position, RunCheckpoints
from arsg_dist.imagenet.training.evaluation import measure, refuse_bad_images
from arsg_dist.imagenet.training.health import HealthMonitor, RankReport
from arsg_dist.imagenet.training.metrics import Evaluation, average_buffers
from arsg_dist.imagenet.training.optimization import shown_hyperparameters
from arsg_dist.imagenet.training.parts import RunParts, Start
from arsg_dist.imagenet.training.progress import Progress
from arsg_dist.imagenet.training.rank_state import seed_rank
from arsg_dist.safe_io.text import printable

_Validated = dict[str, tuple[Evaluation, dict[str, Tensor]]]
"""`LAST` and perhaps `EMA` → how good the weights are, and the weights themselves, on rank 0 only."""


class Trainer:
    """The epochs of one training.

    Args:
        parts: of the run.
        start: of the run, this one.
        num_images: of the training split.
    """

    def __init__(self, parts: RunParts, start: Start, *, num_images: int) -> None:
        self._parts, self._start = parts, start
        self._checkpoints = RunCheckpoints(parts, start.output)
        self._at = Position(num_images=num_images)
        self._progress: Progress
        # On rank 0 only:
        self._log: RunLog | None = None
        self._weights: WeightFiles | None = None

    def train(self, environment: dict[str, Any]) -> int:
        """Resume if asked, then train and validate epoch by epoch. Collective.

        Args:
            environment: what this start depends on beside its settings, for the run's records.

        Returns:
            The exit code: 0, or `PREEMPTED` after a signal, with a checkpoint written.
        """
        parts, config = self._parts, self._parts.config
        seed_rank(config.seed, parts.communicator.rank)
        notes = [*parts.notes]
        if self._start.resume:
            self._at, resumed = self._checkpoints.resume(
                num_images=self._at.num_images,
                skip_damaged=self._start.skip_damaged,
                allowed=self._start.allowed,
            )
            notes += resumed
        at = self._at
        earlier = self._open_files(environment)
        if earlier:
            notes.append(
                f"no complete checkpoint in {self._start.output}: started anew; the records of the start before are "
                f"kept in {earlier}"
            )
        last_update = at.update + parts.train_sampler.updates_until(config.epochs - 1, at.images)
        if self._start.max_updates is not None:
            last_update = min(last_update, self._start.max_updates)
        self._progress = Progress(
            self._log,
            rank=parts.communicator.rank,
            world_size=parts.communicator.world_size,
            total_updates=last_update,
            first_update=at.update,
            batch_size=config.batch_size,
        )
        self._say_what_begins(notes)
        loop = EpochLoop(parts, self._checkpoints, at, self._progress, last_update=last_update)
        evaluation: Evaluation | None = None
        for epoch in range(at.epoch, config.epochs):
            speed = loop.train(epoch)
            if speed is None:
                return self._stopped()
            if parts.train_sampler.updates_until(epoch, at.images):
                self._progress.say(
                    f"ended after {at.update} updates, before the end of epoch {epoch + 1}, as asked by --max_updates; "
                    "--resume goes on from the last checkpoint"
                )
                break
            validated = self._validate(loop)
            if validated is None:
                self._checkpoints.save(at)
                return self._stopped()
            self._end_epoch(epoch, speed, validated)
            evaluation = validated[LAST][0]
            if at.update == last_update and epoch + 1 < config.epochs:
                break
        self._checkpoints.finish()
        parts.stop.finish()
        with parts.communicator.fail_together(OSError, ValueError):
            if self._log:
                self._finished(self._log, evaluation)
        return 0

    def _open_files(self, environment: dict[str, Any]) -> Path | None:
        """Open the run's records and weight files, on rank 0. Collective.

        Returns:
            Where an earlier start's records are now; None if there were none, and on the other ranks.
        """
        parts, start, at = self._parts, self._start, self._at
        with parts.communicator.fail_together(OSError, ValueError, ImportError):
            if not parts.leader:
                return None
            earlier = None if start.resume else keep_earlier_records(start.output)
            (start.output / MARKER).unlink(missing_ok=True)
            world_size = parts.communicator.world_size
            self._log = RunLog(
                start.output,
                {**dataclasses.asdict(parts.config), "engine": start.engine, "world_size": world_size},
                resumed_updates=at.update if start.resume else None,
                resumed_epochs=at.epoch,
                environment=environment,
                classes=parts.classes,
                wandb_project=parts.config.wandb_project,
            )
            self._weights = WeightFiles(start.output, resumed_epoch=at.epoch)
        return earlier

    def _say_what_begins(self, notes: list[str]) -> None:
        config, world_size, say = self._parts.config, self._parts.communicator.world_size, self._progress.say
        for note in notes:
            say(printable(note, limit=2000))
        data = "synthetic images" if config.data.source == "synthetic" else config.data.root or DIGITS
        first = self._at.epoch + 1
        epochs = (
            f"epochs {first} to {config.epochs}"
            if first <= config.epochs
            else f"all {config.epochs} epochs done"
        )
        say(
            f"{config.model} on {data}: {self._start.engine}, "
            f"{world_size} ranks × {config.accumulation_steps} × {config.micro_batch_size(world_size)} images, {epochs}"
        )
        if self._log and self._log.changed:
            say("settings changed since the run was started: " + "; ".join(self._log.changed))

    def _validate(self, loop: "EpochLoop") -> _Validated | None:
        """Validate weights and their average; None: a signal ended it. Collective."""
        parts = self._parts
        average_buffers(parts.model, parts.communicator)
        with parts.engine.base_iterate() if parts.config.evaluate_at == "theta" else nullcontext():
            evaluation = loop.evaluate(parts.engine.module)
            weights = parts.engine.whole_weights()
        if evaluation is None:
            return None
        validated = {LAST: (evaluation, weights)}
        if parts.average:
            average_buffers(parts.average.module, parts.communicator)
            evaluation = loop.evaluate(parts.average.module)
            if evaluation is None:
                return None
            validated[EMA] = evaluation, parts.engine.weights_of(parts.average.module)
        return validated

    def _end_epoch(self, epoch: int, speed: dict[str, float], validated: _Validated) -> None:
        """Count and record an epoch, and save its weights and a checkpoint. Collective."""
        parts, config, at = self._parts, self._parts.config, self._at
        train_loss = at.end_epoch()
        parts.schedules.after_epoch(train_loss)
        evaluation = validated[LAST][0]
        # Record and weights first: a resume makes those newer than the checkpoint again, but no missing ones.
        self._progress.epoch(
            at.update,
            epoch=epoch + 1,
            train_loss=train_loss,
            evaluation=evaluation,
            ema=validated[EMA][0] if EMA in validated else None,
            speed=speed,
            hyperparameters=self._checkpoints.shown or shown_hyperparameters(parts.engine.optimizer),
            bad_images=at.bad_images,
            image_size=train_size(config.data, epoch),
        )
        with parts.communicator.fail_together(OSError):
            if self._weights:
                kinds = {LAST: config.evaluate_at, EMA: "ema"}
                for name, (found, weights) in validated.items():
                    about = {"epoch": epoch + 1, "weights": kinds[name], "val_top1": found.top1}
                    self._weights.save(name, weights, about)
        self._checkpoints.save(at, score=evaluation.top1)

    def _finished(self, log: RunLog, evaluation: Evaluation | None) -> None:
        say, output = self._progress.say, self._start.output
        curve = log.close()
        done = self._at.epoch >= self._parts.config.epochs
        if evaluation or done:  # done already, perhaps by a start that was killed before this line
            write_model_card(output)
        if evaluation:
            say(f"validation accuracy {evaluation.top1:.2%} over all {evaluation.images} images")
        elif done:
            say("nothing left to do: this run is finished, its epochs are already done")
        if self._at.bad_images:
            say(f"left out {self._at.bad_images} images that could not be decoded")
        made = ("metrics.jsonl", curve.name, f"{TENSORBOARD}/", f"{CHECKPOINTS}/", f"{WEIGHTS}/")
        say(f"outputs in {output}: {', '.join(name for name in made if (output / name).exists())}")

    def _stopped(self) -> int:
        """End the run, just saved, so that it can be started again. Collective."""
        stop, communicator, update = self._parts.stop, self._parts.communicator, self._at.update
        self._checkpoints.finish()
        stop.finish()
        received = sorted(set(filter(None, communicator.all_gather_object(stop.received))))
        checkpoint = self._checkpoints.latest()
        assert checkpoint is not None
        with communicator.fail_together(OSError, ValueError):
            if self._log:
                self._log.close()
                write_marker(self._start.output, checkpoint=checkpoint, update=update, signals=received)
        self._progress.say(
            f"stopped by {', '.join(received)} after {update} updates; saved to {checkpoint}; "
            f"start again with --resume (exit code {PREEMPTED})"
        )
        return PREEMPTED


class EpochLoop:
    """The steps of epochs and their validation, from a position of a run on.

    Args:
        parts: of the run.
        checkpoints: of the run.
        at: where the run stands; kept up to date.
        progress: what is shown and recorded.
        last_update: update to end at.
    """

    def __init__(
        self,
        parts: RunParts,
        checkpoints: RunCheckpoints,
        at: Position,
        progress: Progress,
        *,
        last_update: int,
    ) -> None:
        self._parts, self._checkpoints = parts, checkpoints
        self._at, self._progress, self._last_update = at, progress, last_update
        self._micro_batch_size = parts.config.micro_batch_size(parts.communicator.world_size)
        self._health = HealthMonitor(parts.config, parts.engine)
        parts.train_sampler.position = at.images
        self._batches: Iterator[Batch] = progress.waiting(batches(parts.train_loader))

    def train(self, epoch: int) -> dict[str, float] | None:
        """Train what is left of an epoch, or its part up to the last update. Collective.

        Returns:
            Its speed; None if a signal ended it.
        """
        parts, progress, sampler, at = self._parts, self._progress, self._parts.train_sampler, self._at
        engine, config, health = parts.engine, parts.config, self._health
        engine.module.train()
        left = sampler.updates_until(epoch, at.images)
        progress.begin_epoch(f"epoch {epoch + 1}/{config.epochs}", left)
        loss_sum = torch.zeros((), device=engine.device, dtype=torch.float64)
        images, bad = 0, list[str]()
        for _ in range(min(left, self._last_update - at.update)):
            weight = sampler.weight(at.images) / self._micro_batch_size
            health.before_update(at.update + 1)
            for _ in range(config.accumulation_steps):
                with health.own_time():
                    batch = next(self._batches)
                    inputs, labels = parts.to_device(batch)
                    bad += batch.bad
                    images += int((batch.labels != IGNORED).sum())
                    inputs, targets = parts.mixing(inputs, labels, at.update)
                    # The sum over what counts, divided by the nominal size: bad images drop out without weighing
                    # others up.
                    loss = torch.stack(
                        [
                            share * cross_entropy_sum(logits, targets)
                            for share, logits in weighted_logits(parts.forward(engine.module, inputs))
                        ]
                    ).sum()
                engine.backward(loss * weight)
                engine.step()
                loss_sum += health.finite(loss, at.update + 1)
            at.update += 1
            # Of this update: the schedule steps below.
            self._checkpoints.shown = shown_hyperparameters(engine.optimizer)
            at.images = sampler.after(at.images)
            health.after_update(at.update)
            parts.schedules.after_update()
            if parts.average:
                parts.average.update(parts.model)
            progress.updated()
            epoch_ended = not sampler.updates_until(epoch, at.images)
            ended = at.update == self._last_update or epoch_ended
            stop = parts.stop.agreed()
            due = config.checkpoint_every > 0 and at.update % config.checkpoint_every == 0
            # After a whole epoch the caller saves. A run that was asked to end here must be one that can be continued.
            needed = due or (ended and not self._checkpoints.any_saved)
            save = stop or (needed and not epoch_ended)
            record = ended or at.update % config.log_every == 0
            if save or record:
                loss_total, images_total, waited = self._exchange(float(loss_sum), images, bad)
                at.add(loss_total, images_total)
                loss_sum.zero_()
                images, bad = 0, []
            if record:
                shown = self._checkpoints.shown
                progress.record(at.update, at.take_recent(), shown, waited, skipped=engine.skipped_updates)
            if save or ended:
                health.require_finite_weights()
            if save:
                self._checkpoints.save(at)
            else:
                self._checkpoints.prepare()
            if stop:
                progress.end_epoch()
                return None
        return progress.end_epoch()

    def evaluate(self, module: nn.Module) -> Evaluation | None:
        """Measure over the validation split; None: a signal ended it. Collective."""
        parts = self._parts
        measured = measure(
            module,
            parts.val_loader,
            device=parts.engine.device,
            to_device=parts.to_device,
            forward=parts.forward,
            stopped=parts.stop.agreed,
        )
        if measured is None:
            return None
        totals, bad = measured
        self._exchange(0.0, 0, bad)
        with parts.communicator.fail_together():
            return totals.over_all_ranks(parts.communicator)

    def _exchange(self, loss_sum: float, images: int, bad: list[str]) -> tuple[float, int, list[float]]:
        """Add up over the ranks; bad images end the run or are counted. Collective."""
        report = dataclasses.astuple(self._health.report())
        mine = (loss_sum, images, bad, self._progress.waited_share(), report)
        of_ranks = self._parts.communicator.all_gather_object(mine)
        losses, counts, messages, waited, reports = zip(*of_ranks, strict=True)
        all_bad = [message for of_rank in messages for message in of_rank]
        refuse_bad_images(all_bad, self._parts.config.data)
        self._at.bad_images += len(all_bad)
        for message in [*all_bad, *self._health.judge([RankReport(*values) for values in reports])]:
            self._progress.say(message)
        return sum(losses), sum(counts), list(waited)
