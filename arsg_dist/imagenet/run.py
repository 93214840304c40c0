"""One start of a run, to its end or a signal: epochs, records, files."""

import dataclasses
from contextlib import nullcontext
from typing import Any

from arsg_dist.engine import copy_weights
from arsg_dist.engine.exit_codes import PREEMPTED
from arsg_dist.imagenet.augmentation import train_size
from arsg_dist.imagenet.digits import DIGITS
from arsg_dist.imagenet.epoch import EpochLoop
from arsg_dist.imagenet.export import write_model_card
from arsg_dist.imagenet.metrics import Evaluation, average_buffers
from arsg_dist.imagenet.optimization import shown_hyperparameters
from arsg_dist.imagenet.position import Position
from arsg_dist.imagenet.progress import Progress
from arsg_dist.imagenet.rank_state import seed_rank
from arsg_dist.imagenet.run_checkpoint import RunCheckpoints
from arsg_dist.imagenet.run_directory import RunLog
from arsg_dist.imagenet.run_parts import Job, RunParts
from arsg_dist.imagenet.stopping import MARKER, write_marker
from arsg_dist.imagenet.weights import EMA, LAST, WeightFiles
from arsg_dist.safe_io.text import printable


class Run:
    """The epochs of one training.

    Args:
        parts: of the run.
        job: this start of it.
        num_images: of the training split.
    """

    def __init__(self, parts: RunParts, job: Job, *, num_images: int) -> None:
        self._parts, self._job = parts, job
        self._checkpoints = RunCheckpoints(parts, job.output)
        self._at = Position(num_images=num_images)
        self._progress: Progress

    def train(self, environment: dict[str, Any]) -> int:
        """Resumes if asked, then trains and validates epoch by epoch.

        Args:
            environment: what this start depends on beside its settings, for the run's records.

        Returns:
            The exit code: 0, or `PREEMPTED` after a signal, with a checkpoint written.
        """
        parts, config, world_size = self._parts, self._parts.config, self._parts.communicator.world_size
        seed_rank(config.seed, parts.communicator.rank)
        notes = list[str]()
        if self._job.resume:
            self._at, notes = self._checkpoints.resume(
                num_images=self._at.num_images, skip_damaged=self._job.skip_damaged
            )
        at = self._at
        log: RunLog | None = None
        with parts.communicator.fail_together(OSError, ValueError, ImportError):
            if parts.leader:
                (self._job.output / MARKER).unlink(missing_ok=True)
                log = RunLog(
                    self._job.output,
                    {**dataclasses.asdict(config), "engine": self._job.engine, "world_size": world_size},
                    resumed_updates=at.update if self._job.resume else None,
                    environment=environment,
                    classes=parts.classes,
                    wandb_project=config.wandb_project,
                )
                files = WeightFiles(self._job.output, resumed_epoch=at.epoch)
        first_update = at.update
        last_update = first_update + parts.train_order.updates_until(config.epochs - 1, at.images)
        if self._job.max_updates is not None:
            last_update = min(last_update, self._job.max_updates)
        self._progress = Progress(
            log,
            rank=parts.communicator.rank,
            world_size=world_size,
            total_updates=last_update,
            first_update=first_update,
            batch_size=config.batch_size,
        )
        say = self._progress.say
        for note in [*parts.notes, *notes]:
            say(printable(note, limit=2000))
        data = "synthetic images" if config.data.source == "synthetic" else config.data.root or DIGITS
        say(
            f"{config.model} on {data}: {self._job.engine}, "
            f"{world_size} ranks × {config.accumulation_steps} × {config.micro_batch_size(world_size)} "
            f"images, epochs {at.epoch + 1} to {config.epochs}"
        )
        if log and log.changed:
            say("settings changed since the run was started: " + "; ".join(log.changed))
        loop = EpochLoop(parts, self._checkpoints, at, self._progress, last_update=last_update)
        evaluation: Evaluation | None = None
        for epoch in range(at.epoch, config.epochs):
            speed = loop.train(epoch)
            if speed is None:
                return self._stopped(log)
            if parts.train_order.updates_until(epoch, at.images):
                say(
                    f"ended after {at.update} updates, before the end of epoch {epoch + 1}, as asked by --max_updates"
                )
                break
            average_buffers(parts.model, parts.communicator)
            with parts.engine.base_iterate() if config.evaluate_at == "theta" else nullcontext():
                evaluation = loop.evaluate(parts.engine.module)
                weights = parts.engine.whole_weights()
            ema, ema_weights = None, {}
            if parts.average and evaluation:
                average_buffers(parts.average.module, parts.communicator)
                ema = loop.evaluate(parts.average.module)
                ema_weights = copy_weights(parts.average.module) if parts.leader else {}
            if evaluation is None or (parts.average and ema is None):
                self._checkpoints.save(at)
                return self._stopped(log)
            train_loss = at.end_epoch()
            parts.schedules.after_epoch(train_loss)
            # Record and weights first: a resume makes those newer than the checkpoint again, but no missing ones.
            self._progress.epoch(
                at.update,
                epoch=epoch + 1,
                train_loss=train_loss,
                evaluation=evaluation,
                ema=ema,
                speed=speed,
                hyperparameters=shown_hyperparameters(parts.engine.optimizer),
                bad_images=at.bad_images,
                image_size=train_size(config.data, epoch),
            )
            with parts.communicator.fail_together(OSError):
                if parts.leader:
                    about = {"epoch": epoch + 1, "weights": config.evaluate_at, "val_top1": evaluation.top1}
                    files.save(LAST, weights, about)
                    if ema:
                        files.save(EMA, ema_weights, {**about, "weights": "ema", "val_top1": ema.top1})
            self._checkpoints.save(at, score=evaluation.top1)
            if at.update == last_update and epoch + 1 < config.epochs:
                break
        self._checkpoints.finish()
        parts.stop.finish()
        with parts.communicator.fail_together(OSError, ValueError):
            if log:
                self._finished(log, evaluation)
        return 0

    def _finished(self, log: RunLog, evaluation: Evaluation | None) -> None:
        say, output = self._progress.say, self._job.output
        curve = log.close()
        done = self._at.epoch >= self._parts.config.epochs
        if evaluation or done:  # done already, perhaps by a start that was killed before this line
            write_model_card(output)
        if evaluation:
            say(f"validation accuracy {evaluation.top1:.2%} over all {evaluation.images} images")
        elif done:
            say("nothing left to do: this run is already done")
        if self._at.bad_images:
            say(f"left out {self._at.bad_images} images that could not be decoded")
        say(f"outputs in {output}: metrics.jsonl, {curve.name}, tensorboard/, checkpoints/, weights/")

    def _stopped(self, log: RunLog | None) -> int:
        """Ends the run, which has just been saved, so that it can be started again."""
        stop, communicator, update = self._parts.stop, self._parts.communicator, self._at.update
        self._checkpoints.finish()
        stop.finish()
        received = sorted(set(filter(None, communicator.all_gather_object(stop.received))))
        checkpoint = self._checkpoints.latest()
        assert checkpoint is not None
        with communicator.fail_together(OSError, ValueError):
            if log:
                log.close()
                write_marker(self._job.output, checkpoint=checkpoint, update=update, signals=received)
        self._progress.say(
            f"stopped by {', '.join(received)} after {update} updates; saved to {checkpoint}; "
            f"start again with --resume (exit code {PREEMPTED})"
        )
        return PREEMPTED
