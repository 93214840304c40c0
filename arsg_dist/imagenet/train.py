"""The training loop, the same on every engine."""

import dataclasses
import os
import socket
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from arsg_dist.checkpoint import CheckpointStore
from arsg_dist.engine import Communicator, Engine, JobError, Ranks, check_agreement
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.data import (
    IGNORED,
    Batch,
    ImageTree,
    TrainingOrder,
    ValidationOrder,
    loader,
    open_splits,
)
from arsg_dist.imagenet.digits import digits_tree
from arsg_dist.imagenet.engines import EngineName, build_engine, deepspeed_settings
from arsg_dist.imagenet.metrics import Evaluation, Totals, average_buffers
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.optimization import build_optimizer, build_schedule, shown_hyperparameters
from arsg_dist.imagenet.run_directory import RunLog, check_output

DIGITS = Path("data/digits")


@dataclass(frozen=True)
class Job:
    """One start of a run: what the recipe does not say.

    Attributes:
        engine: what distributes the training.
        output: the run's directory.
        resume: continue the run in `output`.
        deepspeed_config: path of a DeepSpeed JSON config, for the engine "deepspeed".
    """

    engine: EngineName
    output: Path
    resume: bool = False
    deepspeed_config: str | None = None


def train(config: TrainConfig, job: Job, ranks: Ranks, communicator: Communicator) -> None:
    """Runs a training from start, or from its last checkpoint, to end. Every rank must call it.

    Raises:
        JobError: bad input or a failure all ranks agreed on; raised on every rank.
    """
    with communicator.fail_together():
        check_output(job.output, resume=job.resume)
        micro_batch_size = config.micro_batch_size(communicator.world_size)
        build_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))])  # only to have it checked
        engine_config = None
        if job.engine == "deepspeed":
            assert job.deepspeed_config is not None
            engine_config = deepspeed_settings(config, job.deepspeed_config, communicator.world_size)
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
        model = build_model(config.model, len(train_split.classes))
    check_agreement(
        communicator, config=dataclasses.asdict(config), data=train_split.fingerprint(), seed=config.seed
    )
    _share_cores(communicator)

    engine = build_engine(job.engine, model, config, communicator, ranks, engine_config)
    run = _Run(config, job, engine, train_split, val_split, train_order, micro_batch_size)
    run.train()


def _share_cores(communicator: Communicator) -> None:
    """Ranks on one host share its cores evenly; each would otherwise start as many threads as there are cores."""
    hosts = communicator.all_gather_object(socket.gethostname())
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // hosts.count(socket.gethostname())))


class _Run:
    """The objects of one training and the loop over them."""

    def __init__(
        self,
        config: TrainConfig,
        job: Job,
        engine: Engine,
        train_split: ImageTree,
        val_split: ImageTree,
        train_order: TrainingOrder,
        micro_batch_size: int,
    ) -> None:
        self.config, self.job, self.engine = config, job, engine
        self.communicator = engine.communicator
        self.leader = self.communicator.rank == 0
        self.train_order = train_order
        self.micro_batch_size = micro_batch_size
        data, cuda = config.data, engine.device.type == "cuda"
        train_size = data.crop_size if data.augmentation == "crop" else data.image_size
        val_order = ValidationOrder(
            len(val_split),
            batch_size=config.val_batch_size,
            rank=self.communicator.rank,
            world_size=self.communicator.world_size,
        )
        make_loader = partial(loader, workers=data.workers, pin_memory=cuda)
        self.train_loader: DataLoader[Batch] = make_loader(train_split, train_order, image_size=train_size)
        self.val_loader: DataLoader[Batch] = make_loader(val_split, val_order, image_size=data.image_size)
        self.schedule = build_schedule(
            config.schedule,
            engine.optimizer,
            updates_per_epoch=train_order.updates_per_epoch,
            epochs=config.epochs,
        )
        self.store = CheckpointStore(
            job.output / "checkpoints", self.communicator, keep=config.keep_checkpoints
        )
        self.bad_images = 0
        self.update = 0

    def train(self) -> None:
        """Resumes if asked, then trains and validates epoch by epoch."""
        first_epoch = self._resume() if self.job.resume else 0
        log: RunLog | None = None
        with self.communicator.fail_together(OSError, ImportError):
            if self.leader:
                described = {
                    **dataclasses.asdict(self.config),
                    "engine": self.job.engine,
                    "world_size": self.communicator.world_size,
                }
                log = RunLog(
                    self.job.output, described, resumed_updates=self.update if self.job.resume else None
                )
        self._say(
            f"{self.config.model} on {self.config.data.root or DIGITS}: {self.job.engine}, "
            f"{self.communicator.world_size} ranks × {self.config.accumulation_steps} × {self.micro_batch_size} "
            f"images, epochs {first_epoch + 1} to {self.config.epochs}"
        )
        if log and log.changed:
            self._say("settings changed since the run was started: " + "; ".join(log.changed))
        evaluation: Evaluation | None = None
        for epoch in range(first_epoch, self.config.epochs):
            train_loss, images_per_second = self._train_epoch(epoch, log)
            average_buffers(self.engine.module, self.communicator)
            evaluation = self._evaluate()
            progress = {"epoch": epoch + 1, "update": self.update, "schedule": self.schedule.state_dict()}
            self.store.save(self.update, partial(self.engine.save, progress=progress))
            if log:
                hyperparameters = shown_hyperparameters(self.engine.optimizer)
                values = {
                    "epoch": epoch + 1,
                    "train_loss": train_loss,
                    "val_loss": evaluation.loss,
                    "val_top1": evaluation.top1,
                    "val_top5": evaluation.top5,
                    "val_images": evaluation.images,
                    "images_per_second": images_per_second,
                    "bad_images": self.bad_images,
                    **hyperparameters,
                }
                log.write("epoch", self.update, values)
                self._say(
                    f"epoch {epoch + 1:3d}  train loss {train_loss:.4f}  val loss {evaluation.loss:.4f}  "
                    f"top-1 {evaluation.top1:7.2%}  top-5 {evaluation.top5:7.2%}  {images_per_second:,.0f} images/s  "
                    + "  ".join(f"{key} {value:.4g}" for key, value in hyperparameters.items())
                )
        if log:
            curve = log.close()
            if evaluation:
                self._say(f"validation accuracy {evaluation.top1:.2%} over all {evaluation.images} images")
            else:
                self._say("nothing left to do: all epochs of this run were already done")
            if self.bad_images:
                self._say(f"left out {self.bad_images} images that could not be decoded")
            self._say(
                f"outputs in {self.job.output}: metrics.jsonl, {curve.name}, tensorboard/, checkpoints/"
            )

    def _resume(self) -> int:
        path = self.store.latest()
        with self.communicator.fail_together():
            if path is None:
                raise ValueError(
                    f"--resume: {self.job.output} has no complete checkpoint; start anew with another --output"
                )
            progress = self.engine.load(path)
            self.schedule.load_state_dict(progress["schedule"])
        for group, lr in zip(self.engine.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        self.update = progress["update"]
        self._say(f"resuming from {path}")
        return int(progress["epoch"])

    def _train_epoch(self, epoch: int, log: RunLog | None) -> tuple[float, float]:
        """One epoch; returns its mean training loss and images/s over all ranks."""
        self.train_order.epoch = epoch
        self.engine.module.train()
        updates = self.train_order.updates_per_epoch
        bar = tqdm(
            total=updates * self.config.batch_size,
            unit=" images",
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            disable=not self.leader,
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5 if os.isatty(2) else 10,
        )
        started = time.perf_counter()
        epoch_loss = epoch_images = 0.0
        loss_sum, images, bad = torch.zeros((), device=self.engine.device), 0, list[str]()
        for done, batch in enumerate(self.train_loader, start=1):
            inputs, labels = self._to_device(batch)
            bad += batch.bad
            logits = self.engine.module(inputs)
            # The sum over what counts, divided by the nominal size: bad images drop out without weighing others up.
            loss = functional.cross_entropy(
                logits.float(),
                labels,
                ignore_index=IGNORED,
                reduction="sum",
                label_smoothing=self.config.label_smoothing,
            )
            self.engine.backward(loss / self.micro_batch_size)
            self.engine.step()
            loss_sum += loss.detach()
            images += len(labels) - len(batch.bad)
            if done % self.config.accumulation_steps:
                continue
            self.update += 1
            self.schedule.step()
            bar.update(self.config.batch_size)
            last = done == len(self.train_loader)
            if self.update % self.config.log_every == 0 or last:
                total_loss, total_images = self._exchange(float(loss_sum), images, bad)
                epoch_loss, epoch_images = epoch_loss + total_loss, epoch_images + total_images
                loss_sum, images, bad = torch.zeros_like(loss_sum), 0, []
                rate = (
                    done
                    // self.config.accumulation_steps
                    * self.config.batch_size
                    / (time.perf_counter() - started)
                )
                shown = shown_hyperparameters(self.engine.optimizer)
                mean = total_loss / max(total_images, 1)
                if log:
                    log.write("train", self.update, {"loss": mean, "images_per_second": rate, **shown})
                bar.set_postfix(
                    {"loss": f"{mean:.3f}", **{key: f"{value:.4g}" for key, value in shown.items()}}
                )
        bar.close()
        return epoch_loss / max(epoch_images, 1), updates * self.config.batch_size / (
            time.perf_counter() - started
        )

    def _evaluate(self) -> Evaluation:
        """Loss and accuracy over the whole validation split, every image counted once."""
        self.engine.module.eval()
        totals, bad = Totals(self.engine.device), list[str]()
        with torch.no_grad():
            for batch in self.val_loader:
                inputs, labels = self._to_device(batch)
                bad += batch.bad
                totals.add(self.engine.module(inputs), labels)
        self._exchange(0.0, 0, bad)
        with self.communicator.fail_together():
            return totals.over_all_ranks(self.communicator)

    def _exchange(self, loss_sum: float, images: int, bad: list[str]) -> tuple[float, int]:
        """Adds up over the ranks; images that could not be decoded end the run on every rank, or are counted."""
        parts = self.communicator.all_gather_object((loss_sum, images, bad))
        all_bad = [message for _, _, messages in parts for message in messages]
        if all_bad and self.config.data.on_bad_image == "error":
            raise JobError(
                "\n".join(all_bad) + "\n(--data.on_bad_image skip leaves such images out and counts them)"
            )
        self.bad_images += len(all_bad)
        for message in all_bad:
            self._say(message)
        return sum(loss for loss, _, _ in parts), sum(count for _, count, _ in parts)

    def _to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images = batch.images.to(self.engine.device, dtype=self.engine.input_dtype, non_blocking=True)
        return images, batch.labels.to(self.engine.device, non_blocking=True)

    def _say(self, message: str) -> None:
        if self.leader:
            tqdm.write(message)
