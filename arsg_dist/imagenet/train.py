"""The training loop, the same on every engine."""

import dataclasses
import hashlib
import json
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
from arsg_dist.imagenet import engines, environment
from arsg_dist.imagenet.augmentation import BatchMixing, cross_entropy_sum, train_size
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.data import Batch, ImageTree, TrainingOrder, ValidationOrder, loader, open_splits
from arsg_dist.imagenet.digits import digits_tree
from arsg_dist.imagenet.ema import WeightAverage
from arsg_dist.imagenet.export import write_model_card
from arsg_dist.imagenet.metrics import Evaluation, Totals, average_buffers
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.optimization import Schedules, build_optimizer, shown_hyperparameters
from arsg_dist.imagenet.progress import Progress
from arsg_dist.imagenet.run_directory import RunLog, check_output, import_wandb
from arsg_dist.imagenet.start import share_cores
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


def train(config: TrainConfig, job: Job, ranks: Ranks, communicator: Communicator) -> None:
    """Runs a training from start, or from its last checkpoint, to end. Every rank must call it.

    Raises:
        JobError: bad input or a failure all ranks agreed on; raised on every rank.
    """
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
        root = Path(config.data.root) if config.data.root else digits_tree(DIGITS)
        train_split, val_split = open_splits(root, config.data, seed=config.seed)
        train_order = TrainingOrder(
            len(train_split),
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
    run = _Run(config, job, engine, model, average, train_split, val_split, train_order)
    fingerprint = hashlib.sha256(json.dumps(train_split.fingerprint()).encode()).hexdigest()[:16]
    run.train(environment.describe(engine, hosts=hosts, data=fingerprint, seed=config.seed))


class _Run:
    """The objects of one training and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        job: Job,
        engine: Engine,
        model: nn.Module,
        average: WeightAverage | None,
        train_split: ImageTree,
        val_split: ImageTree,
        train_order: TrainingOrder,
    ) -> None:
        self.config, self.job, self.engine, self.model = config, job, engine, model
        self.communicator = engine.communicator
        self.leader = self.communicator.rank == 0
        self.average = average.to(engine.device) if average else None
        self.classes, self.train_order = train_split.classes, train_order
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
        self.bad_images = 0
        self.update = 0
        self.progress: Progress

    def train(self, described: dict[str, Any]) -> None:
        """Resumes if asked, then trains and validates epoch by epoch."""
        config, world_size = self.config, self.communicator.world_size
        first_epoch = self._resume() if self.job.resume else 0
        log: RunLog | None = None
        with self.communicator.fail_together(OSError, ImportError):
            if self.leader:
                log = RunLog(
                    self.job.output,
                    {**dataclasses.asdict(config), "engine": self.job.engine, "world_size": world_size},
                    resumed_updates=self.update if self.job.resume else None,
                    environment=described,
                    classes=self.classes,
                    wandb_project=config.wandb_project,
                )
                files = WeightFiles(self.job.output, resumed_epoch=first_epoch)
        last_before = self.update
        last_update = config.epochs * self.train_order.updates_per_epoch
        if self.job.max_updates is not None:
            last_update = min(last_update, self.job.max_updates)
        self.progress = Progress(
            log,
            rank=self.communicator.rank,
            world_size=world_size,
            total_updates=last_update,
            first_update=self.update,
            batch_size=config.batch_size,
        )
        say = self.progress.say
        if self.job.resume:
            say(f"resuming after {self.update} updates")
        say(
            f"{config.model} on {config.data.root or DIGITS}: {self.job.engine}, "
            f"{world_size} ranks × {config.accumulation_steps} × {self.micro_batch_size} "
            f"images, epochs {first_epoch + 1} to {config.epochs}"
        )
        if log and log.changed:
            say("settings changed since the run was started: " + "; ".join(log.changed))
        evaluation: Evaluation | None = None
        for epoch in range(first_epoch, config.epochs) if self.update < last_update else ():
            train_loss, speed = self._train_epoch(epoch, last_update)
            if self.update == last_update and last_update % self.train_order.updates_per_epoch:
                say(f"ended after {self.update} updates, inside epoch {epoch + 1}, as asked by --max_updates")
                break
            self.schedules.after_epoch(train_loss)
            average_buffers(self.model, self.communicator)
            with self.engine.base_iterate() if config.evaluate_at == "theta" else nullcontext():
                evaluation = self._evaluate(self.engine.module)
                weights = whole_weights(self.model, leader=self.leader)
            ema, ema_weights = None, {}
            if self.average:
                average_buffers(self.average.module, self.communicator)
                ema = self._evaluate(self.average.module)
                ema_weights = whole_weights(self.average.module, leader=self.leader)
            progress = {
                "epoch": epoch + 1,
                "update": self.update,
                "schedules": self.schedules.state_dict(),
                "ema": self.average.state_dict() if self.average else None,
            }
            self.store.save(self.update, partial(self.engine.save, progress=progress))
            with self.communicator.fail_together(OSError):
                if self.leader:
                    about = {"epoch": epoch + 1, "weights": config.evaluate_at, "val_top1": evaluation.top1}
                    files.save(LAST, weights, about)
                    if ema:
                        files.save(EMA, ema_weights, {**about, "weights": "ema", "val_top1": ema.top1})
            self.progress.epoch(
                self.update,
                epoch=epoch + 1,
                train_loss=train_loss,
                evaluation=evaluation,
                ema=ema,
                speed=speed,
                hyperparameters=shown_hyperparameters(self.engine.optimizer),
                bad_images=self.bad_images,
                image_size=train_size(config.data, epoch),
            )
            if self.update == last_update:
                break
        if log:
            curve = log.close()
            if evaluation:
                write_model_card(self.job.output)
                say(f"validation accuracy {evaluation.top1:.2%} over all {evaluation.images} images")
            elif self.update == last_before:
                say("nothing left to do: this run is already done")
            if self.bad_images:
                say(f"left out {self.bad_images} images that could not be decoded")
            say(
                f"outputs in {self.job.output}: metrics.jsonl, {curve.name}, tensorboard/, checkpoints/, weights/"
            )

    def _resume(self) -> int:
        path = self.store.latest()
        with self.communicator.fail_together():
            if path is None:
                raise ValueError(
                    f"--resume: {self.job.output} has no complete checkpoint; start anew with another --output"
                )
            progress = self.engine.load(path)
            self.schedules.load_state_dict(progress["schedules"])
            if (progress["ema"] is None) != (self.average is None):
                raise ValueError("--resume: ema_decay cannot be switched on or off within a run")
            if self.average:
                self.average.load_state_dict(progress["ema"])
        self.update = progress["update"]
        return int(progress["epoch"])

    def _train_epoch(self, epoch: int, last_update: int) -> tuple[float, dict[str, float]]:
        """One epoch, or its part up to an update; returns its mean training loss and its speed."""
        self.train_order.epoch = epoch
        self.engine.module.train()
        progress, accumulation = self.progress, self.config.accumulation_steps
        progress.begin_epoch(f"epoch {epoch + 1}/{self.config.epochs}", self.train_order.updates_per_epoch)
        epoch_loss = epoch_images = 0.0
        loss_sum, images, bad = torch.zeros((), device=self.engine.device), 0, list[str]()
        for done, batch in enumerate(progress.waiting(self.train_loader), start=1):
            inputs, labels = self._to_device(batch)
            bad += batch.bad
            inputs, targets = self.mixing(inputs, labels, self.update)
            # The sum over what counts, divided by the nominal size: bad images drop out without weighing others up.
            loss = cross_entropy_sum(self._forward(self.engine.module, inputs), targets)
            self.engine.backward(loss / self.micro_batch_size)
            self.engine.step()
            loss_sum += loss.detach()
            images += len(labels) - len(batch.bad)
            if done % accumulation:
                continue
            self.update += 1
            self.schedules.after_update()
            if self.average:
                self.average.update(self.model)
            progress.updated()
            last = done == len(self.train_loader) or self.update == last_update
            if self.update % self.config.log_every == 0 or last:
                total_loss, total_images, waited = self._exchange(float(loss_sum), images, bad)
                epoch_loss, epoch_images = epoch_loss + total_loss, epoch_images + total_images
                loss_sum, images, bad = torch.zeros_like(loss_sum), 0, []
                shown = shown_hyperparameters(self.engine.optimizer)
                progress.record(self.update, total_loss / max(total_images, 1), shown, waited)
            if last:
                break
        return epoch_loss / max(epoch_images, 1), progress.end_epoch()

    def _forward(self, module: nn.Module, images: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            logits: torch.Tensor = module(images)
        return logits

    def _evaluate(self, module: nn.Module) -> Evaluation:
        """Loss and accuracy over the whole validation split, every image counted once."""
        module.eval()
        totals, bad = Totals(self.engine.device), list[str]()
        with torch.no_grad():
            for batch in self.val_loader:
                inputs, labels = self._to_device(batch)
                bad += batch.bad
                totals.add(self._forward(module, inputs.to(next(module.parameters()).dtype)), labels)
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
        self.bad_images += len(all_bad)
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
