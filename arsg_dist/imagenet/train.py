"""The training loop, the same on every engine."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from arsg_dist.checkpoint import CheckpointStore
from arsg_dist.engine import Communicator, Engine, JobError, Ranks, check_agreement
from arsg_dist.engine.exit_codes import PREEMPTED
from arsg_dist.imagenet import engines, environment
from arsg_dist.imagenet.augmentation import BatchMixing, cross_entropy_sum, train_size
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.data import (
    IGNORED,
    Batch,
    Split,
    TrainingOrder,
    ValidationOrder,
    batches,
    loader,
    open_splits,
)
from arsg_dist.imagenet.digits import digits_tree
from arsg_dist.imagenet.ema import WeightAverage
from arsg_dist.imagenet.export import write_model_card
from arsg_dist.imagenet.metrics import Evaluation, Totals, average_buffers
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.optimization import Schedules, build_optimizer, shown_hyperparameters
from arsg_dist.imagenet.position import Position
from arsg_dist.imagenet.progress import Progress
from arsg_dist.imagenet.rank_state import load_rank_state, save_rank_state, seed_rank
from arsg_dist.imagenet.run_directory import RunLog, check_output, import_wandb
from arsg_dist.imagenet.start import share_cores
from arsg_dist.imagenet.stopping import MARKER, StopRequest, write_marker
from arsg_dist.imagenet.weights import EMA, LAST, WeightFiles, whole_weights

DIGITS = Path("data/digits")


@dataclass(frozen=True)
class Job:
    """One start of a run: what the recipe does not say.

    Attributes:
        engine: what distributes the training.
        output: the run's directory.
        resume: continue the run in `output`.
        deepspeed_config: path of a DeepSpeed JSON config, for the engine "deepspeed".
        max_updates: end after this many weight updates of the whole run, inside an epoch or not, without validation
            and checkpoint of an epoch that is not finished; None for the recipe's end.
    """

    engine: engines.EngineName
    output: Path
    resume: bool = False
    deepspeed_config: str | None = None
    max_updates: int | None = None


def train(config: TrainConfig, job: Job, ranks: Ranks, communicator: Communicator) -> int:
    """Runs a training from start, or from its last checkpoint, to its end or a signal. Every rank must call it.

    Returns:
        The exit code: 0, or `PREEMPTED` after a signal, with a checkpoint written.

    Raises:
        JobError: bad input or a failure all ranks agreed on; raised on every rank.
    """
    stop = StopRequest(communicator)
    with stop.installed():
        return _train(config, job, ranks, communicator, stop)


def _train(config: TrainConfig, job: Job, ranks: Ranks, communicator: Communicator, stop: StopRequest) -> int:
    with communicator.fail_together():
        check_output(job.output, resume=job.resume)
        config.micro_batch_size(communicator.world_size)
        build_optimizer(config.optimizer, [nn.Parameter(torch.zeros(1))])  # only to have it checked
        if config.wandb_project:
            import_wandb()
        engine_config = None
        if job.engine == "deepspeed":
            assert job.deepspeed_config is not None
            engine_config = engines.deepspeed_settings(config, job.deepspeed_config, communicator.world_size)
    with communicator.fail_together():
        use_digits = config.data.source == "folder" and config.data.root is None
        root = digits_tree(DIGITS) if use_digits else Path(config.data.root or "")
        train_split, val_split = open_splits(root, config.data, seed=config.seed)
        train_order = TrainingOrder(
            len(train_split),
            epochs=config.epochs,
            batch_size=config.batch_size,
            accumulation_steps=config.accumulation_steps,
            rank=communicator.rank,
            world_size=communicator.world_size,
            seed=config.seed,
        )
        torch.manual_seed(config.seed)
        model = build_model(config.model, len(train_split.classes), zero_init_gamma=config.zero_init_gamma)
    check_agreement(
        communicator, config=dataclasses.asdict(config), data=train_split.fingerprint(), seed=config.seed
    )
    hosts = share_cores(communicator)
    average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
    engine = engines.build_engine(job.engine, model, config, communicator, ranks, engine_config)
    run = _Run(config, job, engine, model, average, train_split, val_split, train_order, stop)
    fingerprint = hashlib.sha256(json.dumps(train_split.fingerprint()).encode()).hexdigest()[:16]
    return run.train(environment.describe(engine, hosts=hosts, data=fingerprint, seed=config.seed))


class _Run:
    """The objects of one training and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        job: Job,
        engine: Engine,
        model: nn.Module,
        average: WeightAverage | None,
        train_split: Split,
        val_split: Split,
        train_order: TrainingOrder,
        stop: StopRequest,
    ) -> None:
        self.config, self.job, self.engine, self.model = config, job, engine, model
        self.communicator = engine.communicator
        self.leader = self.communicator.rank == 0
        self.average = average.to(engine.device) if average else None
        self.classes, self.train_order, self.stop = train_split.classes, train_order, stop
        self.micro_batch_size = config.micro_batch_size(self.communicator.world_size)
        self.autocast = engines.autocast(config, job.engine, engine.device)
        self.mixing = BatchMixing(
            config.data,
            num_classes=len(self.classes),
            label_smoothing=config.label_smoothing,
            seed=config.seed,
        )
        val_order = ValidationOrder(
            len(val_split),
            batch_size=config.val_batch_size,
            rank=self.communicator.rank,
            world_size=self.communicator.world_size,
        )
        data = config.data
        make_loader = partial(loader, workers=data.workers, pin_memory=engine.device.type == "cuda")
        self.train_loader: DataLoader[Batch] = make_loader(
            train_split, train_order, image_size=data.full_train_size
        )
        self.val_loader: DataLoader[Batch] = make_loader(val_split, val_order, image_size=data.image_size)
        self.schedules = Schedules(
            config,
            engine.optimizer,
            updates_per_epoch=train_order.updates_per_epoch,
            communicator=self.communicator,
        )
        self.store = CheckpointStore(
            job.output / "checkpoints", self.communicator, keep=config.keep_checkpoints
        )
        self.at = Position(num_images=len(train_split))
        self.progress: Progress
        self.batches: Iterator[Batch]

    def train(self, described: dict[str, Any]) -> int:
        """Resumes if asked, then trains and validates epoch by epoch; returns the exit code."""
        config, world_size = self.config, self.communicator.world_size
        seed_rank(config.seed, self.communicator.rank)
        notes = self._resume() if self.job.resume else []
        log: RunLog | None = None
        with self.communicator.fail_together(OSError, ImportError):
            if self.leader:
                (self.job.output / MARKER).unlink(missing_ok=True)
                log = RunLog(
                    self.job.output,
                    {**dataclasses.asdict(config), "engine": self.job.engine, "world_size": world_size},
                    resumed_updates=self.at.update if self.job.resume else None,
                    environment=described,
                    classes=self.classes,
                    wandb_project=config.wandb_project,
                )
                files = WeightFiles(self.job.output, resumed_epoch=self.at.epoch)
        first_update = self.at.update
        last_update = first_update + self.train_order.updates_until(config.epochs - 1, self.at.images)
        if self.job.max_updates is not None:
            last_update = min(last_update, self.job.max_updates)
        self.progress = Progress(
            log,
            rank=self.communicator.rank,
            world_size=world_size,
            total_updates=last_update,
            first_update=first_update,
            batch_size=config.batch_size,
        )
        say = self.progress.say
        for note in notes:
            say(note)
        data = "synthetic images" if config.data.source == "synthetic" else config.data.root or DIGITS
        say(
            f"{config.model} on {data}: {self.job.engine}, "
            f"{world_size} ranks × {config.accumulation_steps} × {self.micro_batch_size} "
            f"images, epochs {self.at.epoch + 1} to {config.epochs}"
        )
        if log and log.changed:
            say("settings changed since the run was started: " + "; ".join(log.changed))
        self.train_order.position = self.at.images
        self.batches = self.progress.waiting(batches(self.train_loader))
        evaluation: Evaluation | None = None
        for epoch in range(self.at.epoch, config.epochs):
            speed = self._train_epoch(epoch, last_update)
            if speed is None:
                return self._stopped(log)
            if self.train_order.updates_until(epoch, self.at.images):
                say(
                    f"ended after {self.at.update} updates, inside epoch {epoch + 1}, as asked by --max_updates"
                )
                break
            average_buffers(self.model, self.communicator)
            with self.engine.base_iterate() if config.evaluate_at == "theta" else nullcontext():
                evaluation = self._evaluate(self.engine.module)
                weights = whole_weights(self.model, leader=self.leader)
            ema, ema_weights = None, {}
            if self.average and evaluation:
                average_buffers(self.average.module, self.communicator)
                ema = self._evaluate(self.average.module)
                ema_weights = whole_weights(self.average.module, leader=self.leader)
            if evaluation is None or (self.average and ema is None):
                self._save()
                return self._stopped(log)
            train_loss = self.at.end_epoch()
            self.schedules.after_epoch(train_loss)
            # The record first: a resume drops records that are newer than the checkpoint, but cannot make missing ones.
            self.progress.epoch(
                self.at.update,
                epoch=epoch + 1,
                train_loss=train_loss,
                evaluation=evaluation,
                ema=ema,
                speed=speed,
                hyperparameters=shown_hyperparameters(self.engine.optimizer),
                bad_images=self.at.bad_images,
                image_size=train_size(config.data, epoch),
            )
            self._save(score=evaluation.top1)
            with self.communicator.fail_together(OSError):
                if self.leader:
                    about = {"epoch": epoch + 1, "weights": config.evaluate_at, "val_top1": evaluation.top1}
                    files.save(LAST, weights, about)
                    if ema:
                        files.save(EMA, ema_weights, {**about, "weights": "ema", "val_top1": ema.top1})
            if self.at.update == last_update and epoch + 1 < config.epochs:
                break
        self.stop.finish()
        if log:
            curve = log.close()
            if evaluation:
                write_model_card(self.job.output)
                say(f"validation accuracy {evaluation.top1:.2%} over all {evaluation.images} images")
            elif self.at.update == first_update:
                say("nothing left to do: this run is already done")
            if self.at.bad_images:
                say(f"left out {self.at.bad_images} images that could not be decoded")
            say(
                f"outputs in {self.job.output}: metrics.jsonl, {curve.name}, tensorboard/, checkpoints/, weights/"
            )
        return 0

    def _resume(self) -> list[str]:
        """Goes to where the last checkpoint stands; returns what the user should know about it."""
        path = self.store.latest()
        with self.communicator.fail_together():
            if path is None:
                raise ValueError(
                    f"--resume: {self.job.output} has no complete checkpoint; start anew with another --output"
                )
            progress = self.engine.load(path)
            at = Position.from_dict(progress)
            if at.num_images != self.at.num_images:
                raise ValueError(
                    f"--resume: the training split had {at.num_images} images and has {self.at.num_images} now: "
                    "the order of images cannot be continued"
                )
            self.schedules.load_state_dict(progress["schedules"])
            if (progress["ema"] is None) != (self.average is None):
                raise ValueError("--resume: ema_decay cannot be switched on or off within a run")
            if self.average:
                self.average.load_state_dict(progress["ema"])
            same_ranks = load_rank_state(
                path, self._stateful(), self.communicator, seed=self.config.seed, update=at.update
            )
        self.at = at
        notes = [
            f"resuming from {path}: {at.update} updates, {at.images} training images in {at.epoch} whole epochs"
        ]
        if not same_ranks:
            notes.append(
                "on another number of ranks: the same images in the same order, but other random numbers in the network"
            )
        return notes

    def _stateful(self) -> dict[str, nn.Module]:
        return {"model": self.model, **({"ema": self.average.module} if self.average else {})}

    def _save(self, score: float | None = None) -> None:
        progress = {
            **self.at.as_dict(),
            "schedules": self.schedules.state_dict(),
            "ema": self.average.state_dict() if self.average else None,
        }

        def write(directory: Path) -> None:
            self.engine.save(directory, progress)
            save_rank_state(directory, self._stateful(), self.communicator.rank)

        self.store.save(self.at.update, write, score=score)

    def _stopped(self, log: RunLog | None) -> int:
        """Ends the run, which has just been saved, so that it can be started again."""
        self.stop.finish()
        received = sorted(set(filter(None, self.communicator.all_gather_object(self.stop.received))))
        checkpoint = self.store.latest()
        assert checkpoint is not None
        with self.communicator.fail_together(OSError):
            if log:
                log.close()
                write_marker(self.job.output, checkpoint=checkpoint, update=self.at.update, signals=received)
        self.progress.say(
            f"stopped by {', '.join(received)} after {self.at.update} updates; saved to {checkpoint}; "
            f"start again with --resume (exit code {PREEMPTED})"
        )
        return PREEMPTED

    def _train_epoch(self, epoch: int, last_update: int) -> dict[str, float] | None:
        """What is left of an epoch, or its part up to an update; returns its speed, None if a signal ended it."""
        self.engine.module.train()
        progress, order, at = self.progress, self.train_order, self.at
        left = order.updates_until(epoch, at.images)
        progress.begin_epoch(f"epoch {epoch + 1}/{self.config.epochs}", left)
        every = self.config.checkpoint_every
        loss_sum = torch.zeros((), device=self.engine.device, dtype=torch.float64)
        images, bad = 0, list[str]()
        for _ in range(min(left, last_update - at.update)):
            weight = order.weight(at.images) / self.micro_batch_size
            for _ in range(self.config.accumulation_steps):
                batch = next(self.batches)
                inputs, labels = self._to_device(batch)
                bad += batch.bad
                images += int((batch.labels != IGNORED).sum())
                inputs, targets = self.mixing(inputs, labels, at.update)
                # The sum over what counts, divided by the nominal size: bad images drop out without weighing others up.
                loss = cross_entropy_sum(self._forward(self.engine.module, inputs), targets)
                self.engine.backward(loss * weight)
                self.engine.step()
                loss_sum += loss.detach()
            at.update += 1
            at.images = order.after(at.images)
            self.schedules.after_update()
            if self.average:
                self.average.update(self.model)
            progress.updated()
            ended = at.update == last_update or not order.updates_until(epoch, at.images)
            stop = self.stop.agreed()
            save = stop or (every > 0 and at.update % every == 0 and not ended)
            record = ended or at.update % self.config.log_every == 0
            if save or record:
                loss_total, images_total, waited = self._exchange(float(loss_sum), images, bad)
                at.add(loss_total, images_total)
                loss_sum.zero_()
                images, bad = 0, []
            if record:
                shown = shown_hyperparameters(self.engine.optimizer)
                progress.record(at.update, at.take_recent(), shown, waited)
            if save:
                self._save()
            if stop:
                progress.end_epoch()
                return None
        return progress.end_epoch()

    def _forward(self, module: nn.Module, images: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            logits: torch.Tensor = module(images)
        return logits

    def _evaluate(self, module: nn.Module) -> Evaluation | None:
        """Loss and accuracy over the whole validation split, every image counted once; None if a signal ended it."""
        module.eval()
        totals, bad = Totals(self.engine.device), list[str]()
        with torch.no_grad():
            for batch in batches(self.val_loader):
                inputs, labels = self._to_device(batch)
                bad += batch.bad
                totals.add(self._forward(module, inputs.to(next(module.parameters()).dtype)), labels)
                if self.stop.agreed():
                    return None
        self._exchange(0.0, 0, bad)
        with self.communicator.fail_together():
            return totals.over_all_ranks(self.communicator)

    def _exchange(self, loss_sum: float, images: int, bad: list[str]) -> tuple[float, int, list[float]]:
        """Adds up over the ranks; images that could not be decoded end the run on every rank, or are counted."""
        parts = self.communicator.all_gather_object((loss_sum, images, bad, self.progress.waited_share()))
        all_bad = [message for _, _, messages, _ in parts for message in messages]
        if all_bad and self.config.data.on_bad_image == "error":
            raise JobError(
                "\n".join(all_bad) + "\n(--data.on_bad_image skip leaves such images out and counts them)"
            )
        self.at.bad_images += len(all_bad)
        for message in all_bad:
            self.progress.say(message)
        losses, counts, _, waited = zip(*parts, strict=True)
        return sum(losses), sum(counts), list(waited)

    def _to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        images = batch.images.to(
            self.engine.device, dtype=self.engine.input_dtype, memory_format=layout, non_blocking=True
        )
        return images, batch.labels.to(self.engine.device, non_blocking=True)
