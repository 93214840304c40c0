"""A training from its settings: input checked, parts built, the same on every engine."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from arsg_dist.engine import Communicator, Ranks, check_agreement
from arsg_dist.imagenet import dali, engines, environment
from arsg_dist.imagenet.augmentation import BatchMixing
from arsg_dist.imagenet.config import DataConfig, TrainConfig
from arsg_dist.imagenet.data import (
    Batch,
    ImageSplit,
    Split,
    TrainingOrder,
    ValidationOrder,
    loader,
    open_splits,
)
from arsg_dist.imagenet.digits import DIGITS, digits_tree
from arsg_dist.imagenet.ema import WeightAverage
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.optimization import Schedules, build_optimizer
from arsg_dist.imagenet.run import Run
from arsg_dist.imagenet.run_directory import check_output, import_wandb
from arsg_dist.imagenet.run_parts import Job, RunParts
from arsg_dist.imagenet.start import share_cores
from arsg_dist.imagenet.stopping import StopRequest


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
        micro_batch_size = config.micro_batch_size(communicator.world_size)
        build_optimizer(config.optimizer, [nn.Parameter(torch.zeros(1))])  # only to have it checked
        if config.data.loader == "dali":
            dali.check_dali()
        if config.wandb_project:
            import_wandb()
        builder = engines.prepare(job.engine, config, job.deepspeed_config, communicator.world_size)
    data = config.data
    with communicator.fail_together():
        use_digits = data.source == "folder" and data.root is None
        root = digits_tree(DIGITS) if use_digits else Path(data.root or "")
        train_split, val_split = open_splits(root, data, seed=config.seed)
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
    engine = engines.build_engine(builder, model, config, communicator, ranks)
    val_order = ValidationOrder(
        len(val_split),
        batch_size=config.val_batch_size,
        rank=communicator.rank,
        world_size=communicator.world_size,
    )
    make_loader = partial(_loader, data=data, seed=config.seed, device=engine.device)
    parts = RunParts(
        config=config,
        engine=engine,
        model=model,
        average=average.to(engine.device) if average else None,
        schedules=Schedules(
            config,
            engine.optimizer,
            updates_per_epoch=train_order.updates_per_epoch,
            communicator=engine.communicator,
        ),
        autocast=engines.autocast(builder.precision, engine.device),
        mixing=BatchMixing(
            data,
            num_classes=len(train_split.classes),
            label_smoothing=config.label_smoothing,
            seed=config.seed,
        ),
        train_order=train_order,
        train_loader=make_loader(train_split, train_order, train=True, batch_size=micro_batch_size),
        val_loader=make_loader(val_split, val_order, train=False, batch_size=config.val_batch_size),
        classes=train_split.classes,
        notes=[*train_split.notes, *val_split.notes],
        stop=stop,
    )
    fingerprint = hashlib.sha256(json.dumps(train_split.fingerprint()).encode()).hexdigest()[:16]
    described = environment.describe(engine, hosts=hosts, data=fingerprint, seed=config.seed)
    return Run(parts, job, num_images=len(train_split)).train(described)


def _loader(
    split: Split,
    order: TrainingOrder | ValidationOrder,
    *,
    data: DataConfig,
    train: bool,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Iterable[Batch]:
    image_size = data.full_train_size if train else data.image_size
    if data.loader == "dali":
        assert isinstance(split, ImageSplit)
        return dali.DaliLoader(
            split,
            order,
            config=data,
            train=train,
            batch_size=batch_size,
            image_size=image_size,
            seed=seed,
            device=device,
        )
    pin_memory = device.type == "cuda"
    return loader(split, order, workers=data.workers, image_size=image_size, pin_memory=pin_memory)
