"""The steps of one epoch: training, and the validation after it."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from arsg_dist.engine import JobError
from arsg_dist.imagenet.augmentation import cross_entropy_sum
from arsg_dist.imagenet.data import IGNORED, Batch, batches
from arsg_dist.imagenet.metrics import Evaluation, Totals
from arsg_dist.imagenet.optimization import shown_hyperparameters
from arsg_dist.imagenet.position import Position
from arsg_dist.imagenet.progress import Progress
from arsg_dist.imagenet.run_checkpoint import RunCheckpoints
from arsg_dist.imagenet.run_parts import RunParts
from arsg_dist.imagenet.watch import RankReport, RunWatch


class EpochLoop:
    """Trains and validates, from a position of a run on.

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
        self._watch = RunWatch(parts.config, parts.engine)
        parts.train_order.position = at.images
        self._batches: Iterator[Batch] = progress.waiting(batches(parts.train_loader))

    def train(self, epoch: int) -> dict[str, float] | None:
        """What is left of an epoch, or its part up to an update; returns its speed, None if a signal ended it."""
        parts, progress, order, at = self._parts, self._progress, self._parts.train_order, self._at
        engine, config, watch = parts.engine, parts.config, self._watch
        engine.module.train()
        left = order.updates_until(epoch, at.images)
        progress.begin_epoch(f"epoch {epoch + 1}/{config.epochs}", left)
        loss_sum = torch.zeros((), device=engine.device, dtype=torch.float64)
        images, bad = 0, list[str]()
        for _ in range(min(left, self._last_update - at.update)):
            weight = order.weight(at.images) / self._micro_batch_size
            watch.before_update(at.update + 1)
            for _ in range(config.accumulation_steps):
                with watch.own_time():
                    batch = next(self._batches)
                    inputs, labels = parts.to_device(batch)
                    bad += batch.bad
                    images += int((batch.labels != IGNORED).sum())
                    inputs, targets = parts.mixing(inputs, labels, at.update)
                    # The sum over what counts, divided by the nominal size: bad images drop out without weighing
                    # others up.
                    loss = cross_entropy_sum(parts.forward(engine.module, inputs), targets)
                engine.backward(loss * weight)
                engine.step()
                loss_sum += watch.finite(loss, at.update + 1)
            at.update += 1
            at.images = order.after(at.images)
            watch.after_update(at.update)
            parts.schedules.after_update()
            if parts.average:
                parts.average.update(parts.model)
            progress.updated()
            epoch_ended = not order.updates_until(epoch, at.images)
            ended = at.update == self._last_update or epoch_ended
            stop = parts.stop.agreed()
            due = config.checkpoint_every > 0 and at.update % config.checkpoint_every == 0
            save = stop or (due and not epoch_ended)  # after a whole epoch the caller saves
            record = ended or at.update % config.log_every == 0
            if save or record:
                loss_total, images_total, waited = self._exchange(float(loss_sum), images, bad)
                at.add(loss_total, images_total)
                loss_sum.zero_()
                images, bad = 0, []
            if record:
                shown = shown_hyperparameters(engine.optimizer)
                progress.record(at.update, at.take_recent(), shown, waited, skipped=engine.skipped_updates)
            if save or ended:
                watch.require_finite_weights()
            if save:
                self._checkpoints.save(at)
            if stop:
                progress.end_epoch()
                return None
        return progress.end_epoch()

    def evaluate(self, module: nn.Module) -> Evaluation | None:
        """Loss and accuracy over the whole validation split, every image counted once; None if a signal ended it."""
        parts = self._parts
        module.eval()
        totals, bad = Totals(parts.engine.device), list[str]()
        with torch.no_grad():
            for batch in batches(parts.val_loader):
                inputs, labels = parts.to_device(batch)
                bad += batch.bad
                totals.add(parts.forward(module, inputs.to(next(module.parameters()).dtype)), labels)
                if parts.stop.agreed():
                    return None
        self._exchange(0.0, 0, bad)
        with parts.communicator.fail_together():
            return totals.over_all_ranks(parts.communicator)

    def _exchange(self, loss_sum: float, images: int, bad: list[str]) -> tuple[float, int, list[float]]:
        """Adds up over the ranks; images that could not be decoded end the run on every rank, or are counted."""
        report = dataclasses.astuple(self._watch.report())
        mine = (loss_sum, images, bad, self._progress.waited_share(), report)
        of_ranks = self._parts.communicator.all_gather_object(mine)
        losses, counts, messages, waited, reports = zip(*of_ranks, strict=True)
        all_bad = [message for of_rank in messages for message in of_rank]
        if all_bad and self._parts.config.data.on_bad_image == "error":
            raise JobError(
                "\n".join(all_bad) + "\n(--data.on_bad_image skip leaves such images out and counts them)"
            )
        self._at.bad_images += len(all_bad)
        for message in [*all_bad, *self._watch.judge([RankReport(*values) for values in reports])]:
            self._progress.say(message)
        return sum(losses), sum(counts), list(waited)
