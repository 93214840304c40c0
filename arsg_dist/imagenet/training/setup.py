"""Build a training from its settings, the same on every engine."""

import dataclasses
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

import torch

from arsg_dist.checkpoint.store import put_back
from arsg_dist.engine import Communicator, EngineBuilder, Ranks, check_agreement
from arsg_dist.imagenet.config import DataConfig, TrainConfig
from arsg_dist.imagenet.data import dali
from arsg_dist.imagenet.data.builtin import DIGITS, digits_tree
from arsg_dist.imagenet.data.dataset import Batch, ImageSplit, Split, loader, open_splits, processes_ended
from arsg_dist.imagenet.data.delivery import require_shared_memory
from arsg_dist.imagenet.data.sampler import TrainingSampler, ValidationSampler
from arsg_dist.imagenet.data.transforms import BatchMixing, train_size
from arsg_dist.imagenet.models import build_model, require_image_sizes
from arsg_dist.imagenet.output.environment import describe
from arsg_dist.imagenet.output.run_directory import CHECKPOINTS, LOCK, check_output, directory_of
from arsg_dist.imagenet.output.run_log import import_wandb
from arsg_dist.imagenet.output.states import Action, OutputState, decide, look_at, refusal
from arsg_dist.imagenet.signals import StopRequest
from arsg_dist.imagenet.training.ema import WeightAverage
from arsg_dist.imagenet.training.engines import autocast, build_engine, prepare
from arsg_dist.imagenet.training.identity import identity_of
from arsg_dist.imagenet.training.optimization import Schedules, check_optimizer
from arsg_dist.imagenet.training.parts import RunParts, Start
from arsg_dist.imagenet.training.trainer import Trainer
from arsg_dist.safe_io.lock import DirectoryLock, StartOfJob

_LOOK_EVERY: Final = 0.5  # seconds


def train(
    config: TrainConfig,
    start: Start,
    ranks: Ranks,
    communicator: Communicator,
    stop: StopRequest | None = None,
) -> int:
    """Train from the start or the last checkpoint, to the end or a signal. Collective.

    Args:
        config: of the run.
        start: of the run, this one.
        ranks: of the job.
        communicator: of all ranks.
        stop: of a program that handles signals before and after the training too.

    Returns:
        The exit code: 0, or `PREEMPTED` after a signal, with a checkpoint written.

    Raises:
        JobError: bad input or a failure all ranks agreed on; raised on every rank.
    """
    stop = stop or StopRequest()
    lock = DirectoryLock(start.output, LOCK, job=_start_of_batch_job(os.environ))
    with stop.installed(), closing(lock):
        start = _decided(start, communicator, lock)
        stop.begin(communicator)
        with communicator.fail_together():
            builder = _check(config, start, communicator.world_size)
        with communicator.fail_together():
            train_split, val_split = open_data(config)
            train_sampler, val_sampler = samplers(config, train_split, val_split, communicator)
            torch.manual_seed(config.seed)
            classes = train_split.classes
            model = build_model(config.model, len(classes), zero_init_gamma=config.zero_init_gamma)
            require_image_sizes(
                model,
                config.model,
                train=(train_size(config.data, epoch) for epoch in range(config.epochs)),
                batch_size=config.micro_batch_size(communicator.world_size),
                val=config.data.image_size,
            )
            builder.check_network(model)
        data = train_split.fingerprint()
        check_agreement(communicator, config=dataclasses.asdict(config), data=data, seed=config.seed)
        identity = identity_of(config, builder, train_split, val_split, communicator)
        hosts = share_cores(communicator)
        with communicator.fail_together():
            require_room(
                config.data,
                communicator,
                hosts,
                batch_size=config.micro_batch_size(communicator.world_size),
                val_batch_size=config.val_batch_size,
            )
        average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        engine = build_engine(builder, model, config, communicator, ranks)
        if average:
            engine.hold(average.module)
        make_loader = partial(split_loader, data=config.data, seed=config.seed, device=engine.device)
        micro_batch_size = config.micro_batch_size(communicator.world_size)
        train_loader = make_loader(train_split, train_sampler, train=True, batch_size=micro_batch_size)
        val_loader = make_loader(val_split, val_sampler, train=False, batch_size=config.val_batch_size)
        parts = RunParts(
            config=config,
            engine=engine,
            model=model,
            average=average,
            schedules=Schedules(
                config,
                engine.optimizer,
                updates_per_epoch=train_sampler.updates_per_epoch,
                communicator=engine.communicator,
            ),
            autocast=autocast(builder.precision, engine.device),
            mixing=BatchMixing(
                config.data,
                num_classes=len(classes),
                label_smoothing=config.label_smoothing,
                seed=config.seed,
            ),
            train_sampler=train_sampler,
            train_loader=train_loader,
            val_loader=val_loader,
            classes=classes,
            notes=[*train_split.notes, *val_split.notes],
            identity=identity,
            stop=stop,
        )
        digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
        environment = describe(engine, hosts=hosts, data=digest, seed=config.seed)
        with processes_ended(train_loader, val_loader):
            return Trainer(parts, start, num_images=len(train_split)).train(environment)


def _decided(start: Start, communicator: Communicator, lock: DirectoryLock) -> Start:
    """Decide what the start does at its output directory, as rank 0 finds it. Collective.

    Args:
        start: as asked for.
        communicator: of all ranks.
        lock: of the directory, taken on rank 0 before anything is changed there.

    Returns:
        The same start, with `resume` True or False.

    Raises:
        JobError: it is refused; on every rank.
    """
    with communicator.fail_together():
        if communicator.rank == 0:
            if start.resume:
                check_output(start.output, resume=True)
            found = look_at(start.output)
            if not start.resume or found not in (OutputState.RECORDS, OutputState.HALF):
                _refuse(found, start)
    _hold(lock, communicator)
    state = ""
    with communicator.fail_together():
        if communicator.rank == 0:
            if start.resume:
                put_back(directory_of(start.output, CHECKPOINTS))
            found = look_at(start.output)
            _refuse(found, start)
            state = found.name
    found = OutputState[communicator.from_rank_0(state)]
    goes_on = decide(found, start.resume) is Action.GO_ON
    skips = decide(OutputState.DAMAGED, start.resume) is Action.GO_ON_BEFORE
    return dataclasses.replace(start, resume=goes_on, skip_damaged=start.skip_damaged or skips)


def _hold(lock: DirectoryLock, communicator: Communicator) -> None:
    """Take the lock on rank 0. Collective, with each try: ranks that wait for each other too long take one for dead."""
    held = False
    while not held:
        with communicator.fail_together():
            held = communicator.rank != 0 or lock.take()
        held = communicator.from_rank_0(held)
        if not held:
            time.sleep(_LOOK_EVERY)


def _refuse(found: OutputState, start: Start) -> None:
    """Raise ValueError where a start is refused."""
    if decide(found, start.resume) is Action.REFUSE:
        raise ValueError(refusal(found, start.resume, start.output))


def _start_of_batch_job(environ: Mapping[str, str]) -> StartOfJob | None:
    """Tell which start of a batch job this is, where the scheduler says so."""
    job, restarts = environ.get("SLURM_JOB_ID"), environ.get("SLURM_RESTART_COUNT", "0")
    return (f"Slurm {job}", int(restarts)) if job and restarts.isdecimal() else None


def _check(config: TrainConfig, start: Start, world_size: int) -> EngineBuilder:
    """Refuse what is wrong before anything is made; return the engine's builder."""
    check_output(start.output, resume=bool(start.resume))
    config.data.require_root()
    config.micro_batch_size(world_size)
    check_optimizer(config.optimizer)
    if config.data.loader == "dali":
        dali.check_dali()
    if config.wandb_project:
        import_wandb()
    return prepare(start.engine, config, start.deepspeed_config, world_size)


def open_data(config: TrainConfig) -> tuple[Split, Split]:
    """Open both splits; for the root null those of the digits, made on first use."""
    return open_splits(root_of(config.data), config.data, seed=config.seed)


def root_of(data: DataConfig) -> Path:
    """Return where the images are; for the root null the digits, made on first use."""
    use_digits = data.source == "folder" and data.root is None
    return digits_tree(DIGITS) if use_digits else Path(data.root or "")


def require_room(
    data: DataConfig, communicator: Communicator, hosts: list[str], *, batch_size: int, val_batch_size: int
) -> None:
    """Refuse loader processes that have no room on this host; its first rank speaks for all.

    Args:
        data: its settings.
        communicator: of all ranks.
        hosts: name of every rank's.
        batch_size: images per rank and training batch, 0 for none.
        val_batch_size: likewise of validation.

    Raises:
        ValueError: there is no room.
    """
    here = hosts[communicator.rank]
    if hosts.index(here) == communicator.rank:
        require_shared_memory(
            data,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            ranks_here=hosts.count(here),
            pinned=torch.cuda.is_available(),
        )


def samplers(
    config: TrainConfig, train_split: Split, val_split: Split, communicator: Communicator
) -> tuple[TrainingSampler, ValidationSampler]:
    """Make the samplers of this rank, for training and validation."""
    rank, world_size = communicator.rank, communicator.world_size
    return (
        TrainingSampler(
            len(train_split),
            epochs=config.epochs,
            batch_size=config.batch_size,
            accumulation_steps=config.accumulation_steps,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
        ),
        ValidationSampler(len(val_split), batch_size=config.val_batch_size, rank=rank, world_size=world_size),
    )


def split_loader(
    split: Split,
    sampler: TrainingSampler | ValidationSampler,
    *,
    data: DataConfig,
    train: bool,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Iterable[Batch]:
    """Load one rank's batches of a split, with the loader that the settings name."""
    image_size = data.full_train_size if train else data.image_size
    if data.loader == "dali":
        assert isinstance(split, ImageSplit)
        return dali.DaliLoader(
            split,
            sampler,
            config=data,
            train=train,
            batch_size=batch_size,
            image_size=image_size,
            seed=seed,
            device=device,
        )
    return loader(
        split,
        sampler,
        workers=data.workers,
        image_size=image_size,
        pin_memory=device.type == "cuda",
        timeout=data.timeout,
    )


def share_cores(communicator: Communicator) -> list[str]:
    """Divide each host's cores among its ranks. Collective.

    Returns:
        The host name of every rank.
    """
    hosts = communicator.all_gather_object(socket.gethostname())
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // hosts.count(socket.gethostname())))
    return hosts
