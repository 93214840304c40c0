"""Measure trained weights on a validation split, on any number of ranks: `arsg-imagenet evaluate`."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from arsg_dist.engine import ENGINES, Communicator, Ranks, check_agreement, device_of
from arsg_dist.engine.consistency import fingerprints
from arsg_dist.imagenet.config import DataConfig, TrainConfig
from arsg_dist.imagenet.data import dali
from arsg_dist.imagenet.data.dataset import Batch, open_validation, processes_ended
from arsg_dist.imagenet.data.sampler import ValidationSampler
from arsg_dist.imagenet.data.transforms import MEAN, STD, Channels, ValTransform
from arsg_dist.imagenet.models import build_model, require_image_sizes
from arsg_dist.imagenet.recipe import Parser, add_setting_flags, settings_from
from arsg_dist.imagenet.trained import At, Trained, located, open_trained
from arsg_dist.imagenet.training.engines import autocast
from arsg_dist.imagenet.training.evaluation import measure, network_inputs, refuse_bad_images
from arsg_dist.imagenet.training.metrics import Evaluation
from arsg_dist.imagenet.training.setup import require_room, root_of, share_cores, split_loader
from arsg_dist.safe_io.files import write_text
from arsg_dist.safe_io.text import printable

_SETTINGS: Final = (
    *("model", "precision", "channels_last", "val_batch_size", "data.source", "data.root", "data.val_split"),
    *(
        "data.augmentation",
        "data.image_size",
        "data.synthetic_images",
        "data.synthetic_classes",
        "data.workers",
    ),
    *("data.timeout", "data.loader", "data.on_bad_image", "data.max_image_pixels", "data.max_image_bytes"),
)
"""Settings of a training that an evaluation has, too."""


@dataclass(frozen=True)
class Task:
    """What is to be measured, and how.

    Attributes:
        trained: the weights.
        at: which of them.
        config: model, data, precision: the rest is of no meaning here.
        transform: of the images.
        channels: what they are normalised with.
    """

    trained: Trained
    at: At
    config: TrainConfig
    transform: ValTransform
    channels: Channels


def parser_of_evaluation() -> argparse.ArgumentParser:
    """Make the parser of the command's arguments."""
    parser = Parser(
        prog="arsg-imagenet evaluate",
        description="Measures loss, top-1 and top-5 of trained weights over a validation split, each image counted "
        "once. Run it alone or under any launcher that trains: torchrun, deepspeed, horovodrun, mpirun, srun.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        nargs="?",
        type=Path,
        metavar="RUN|CHECKPOINT|FILE",
        help="a run (its newest checkpoint), a checkpoint, or a file of weights. Settings come from the run it lies in",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="in place of the above: .safetensors, or a state dict of torch.save (.pth), as torchvision and timm give",
    )
    parser.add_argument(
        "--at",
        choices=["x", "theta", "ema"],
        default="x",
        help="the weights as trained (default), ARSG's base iterate, or the moving average",
    )
    parser.add_argument(
        "--resize", type=int, metavar="PIXELS", help="the shorter side before the centre crop"
    )
    parser.add_argument(
        "--interpolation", choices=["bilinear", "bicubic"], help="of resizing (default: bilinear)"
    )
    parser.add_argument("--mean", type=float, nargs="+", help="of the channels, 0 … 1: one number, or three")
    parser.add_argument("--std", type=float, nargs="+", help="likewise, their standard deviations")
    parser.add_argument(
        "--engine", default="auto", help="whose launcher starts the ranks (default: see for yourself)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the result to this file, too (JSON)"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    add_setting_flags(parser, _SETTINGS)
    return parser


def choose_connection(requested: str, ranks: Ranks) -> str:
    """Choose the engine whose communicator the ranks meet by; none of them holds the network.

    Args:
        requested: "auto" or a name of `ENGINES`.
        ranks: of this process.

    Raises:
        ValueError: there is no such engine, or it is for a single process.
    """
    if requested == "auto":
        several = [entry for entry in ENGINES.values() if entry.rendezvous and not entry.config_file]
        # torchrun and horovodrun are for their own; under the others the first one will do.
        fitting = [entry for entry in several if ranks.launcher.startswith(entry.rendezvous or "")] or several
        alone = [entry for entry in ENGINES.values() if not entry.rendezvous]
        together = ranks.world_size > 1 or fitting != several
        return (fitting if together else alone)[0].name
    if requested not in ENGINES:
        raise ValueError(f"--engine {requested} is not known; use auto, {', '.join(ENGINES)}")
    if not ENGINES[requested].rendezvous and ranks.world_size > 1:
        raise ValueError(
            f"{ranks.launcher} started {ranks.world_size} ranks, and --engine {requested} is for one: "
            "leave it out"
        )
    return requested


def locate(options: argparse.Namespace) -> Path:
    """Return the checkpoint or file that the arguments name: of a run that goes on its newest checkpoint changes.

    Raises:
        ValueError: something about them.
        OSError: a file cannot be read.
    """
    if (options.source is None) == (options.weights is None):
        raise ValueError(
            "give one of RUN, CHECKPOINT or FILE and --weights FILE"
            + (": nothing says what to evaluate" if options.source is None else ", not both")
        )
    return located(options.source or options.weights)


def read_task(options: argparse.Namespace, path: Path) -> Task:
    """Open the weights, and check the arguments.

    Args:
        options: of `parser_of_evaluation`.
        path: of `locate`, rank 0's.

    Raises:
        ValueError: something about them.
        OSError: a file cannot be read.
    """
    trained = open_trained(path)
    trained.require(options.at)
    config = settings_from(options, dict(trained.settings), f"the settings beside {trained.where}")
    if "model" not in trained.settings and not any(name in ("model", "config") for name, _ in options.given):
        raise ValueError(f"nothing beside {trained.where} says what network it is of: give --model NAME")
    config.data.require_root()
    if config.data.loader == "dali":
        dali.check_dali()
    return Task(trained, options.at, config, *_images(options, config.data))


def _images(options: argparse.Namespace, data: DataConfig) -> tuple[ValTransform, Channels]:
    own = {
        f"--{name}": getattr(options, name) is not None for name in ("resize", "interpolation", "mean", "std")
    }
    if any(own.values()) and (data.source == "synthetic" or data.loader == "dali"):
        given = ", ".join(name for name, is_given in own.items() if is_given)
        raise ValueError(
            f"{given}: for images that Pillow decodes only, not for synthetic ones or data.loader dali"
        )
    if options.resize is not None:
        if data.augmentation != "imagenet":
            raise ValueError(
                f"--resize has no meaning with data.augmentation {data.augmentation}, which does not crop"
            )
        if options.resize < data.image_size:
            raise ValueError(
                f"--resize {options.resize} is smaller than the crop, data.image_size={data.image_size}"
            )
    transform = ValTransform(data, resize=options.resize or 0, bicubic=options.interpolation == "bicubic")
    return transform, (_three("mean", options.mean, MEAN), _three("std", options.std, STD))


def _three(name: str, given: Sequence[float] | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if given is None:
        return default
    least = 0 if name == "mean" else 1e-6
    if len(given) not in (1, 3) or not all(math.isfinite(value) and least <= value <= 1 for value in given):
        raise ValueError(f"--{name} takes one number, or one for each of the three channels, in 0 … 1")
    return tuple(given) if len(given) == 3 else tuple(given) * 3


def evaluate(task: Task, ranks: Ranks, communicator: Communicator) -> tuple[Evaluation, int]:
    """Measure, as the training's validation does. Collective.

    Args:
        task: the same on every rank.
        ranks: of the job.
        communicator: of all ranks.

    Returns:
        The result over all ranks' images, and how many images could not be decoded and were left out.

    Raises:
        JobError: on every rank.
    """
    config, data = task.config, task.config.data
    with communicator.fail_together():
        split = open_validation(root_of(data), data, task.transform)
        if task.trained.classes is not None and task.trained.classes != split.classes:
            raise ValueError(_other_classes(task.trained, split.classes))
        module = build_model(config.model, len(split.classes))
        require_image_sizes(module, config.model, train=(), batch_size=1, val=data.image_size)
        task.trained.load_into(module, task.at)
    weights = fingerprints(module.state_dict().values())
    check_agreement(communicator, config=asdict(config), data=split.fingerprint(), weights=weights)
    hosts = share_cores(communicator)
    with communicator.fail_together():
        require_room(data, communicator, hosts, batch_size=0, val_batch_size=config.val_batch_size)
    device = device_of(ranks)
    module.to(device)
    if config.channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    context = autocast("fp32" if config.precision == "auto" else config.precision, device)

    def forward(network: nn.Module, images: Tensor) -> Any:
        with context:
            return network(images)

    def to_device(batch: Batch) -> tuple[Tensor, Tensor]:
        return network_inputs(
            batch, device, torch.float32, channels_last=config.channels_last, channels=task.channels
        )

    sampler = ValidationSampler(
        len(split),
        batch_size=config.val_batch_size,
        rank=communicator.rank,
        world_size=communicator.world_size,
    )
    make_loader = partial(split_loader, data=data, train=False, seed=config.seed, device=device)
    loader = make_loader(split, sampler, batch_size=config.val_batch_size)
    with processes_ended(loader):
        measured = measure(module, loader, device=device, to_device=to_device, forward=forward)
        assert measured is not None
        totals, bad = measured
        all_bad = [message for of_rank in communicator.all_gather_object(bad) for message in of_rank]
        refuse_bad_images(all_bad, data)
        with communicator.fail_together():
            return totals.over_all_ranks(communicator), len(all_bad)


def report(task: Task, result: Evaluation, bad: int, world_size: int, output: Path | None) -> str:
    """Say the result in a line, and write it where asked.

    Raises:
        OSError: it cannot be written.
    """
    points = {"x": "as trained (x)", "theta": "at the base iterate θ", "ema": "moving average"}
    if output is not None:
        content = {
            "weights": str(task.trained.where),
            "model": task.config.model,
            "at": task.at,
            **asdict(result),
            "bad_images": bad,
            "world_size": world_size,
        }
        write_text(output, json.dumps(content, indent=2) + "\n")
    left_out = f", {bad} left out that could not be decoded" if bad else ""
    return printable(
        f"{task.config.model}, {task.trained.where}, {points[task.at]}: top-1 {result.top1:.3%}, top-5 "
        f"{result.top5:.3%}, loss {result.loss:.4f}, {result.images:,} images{left_out}, "
        f"{world_size} rank{'s' if world_size > 1 else ''}",
        limit=2000,
    )


def _other_classes(trained: Trained, now: list[str]) -> str:
    assert trained.classes is not None
    gone = [name for name in trained.classes if name not in now][:10]
    new = [name for name in now if name not in trained.classes][:10]
    return printable(
        f"the data's classes are not those of {trained.where}, and labels would mean others: it has "
        f"{', '.join(gone) or 'nothing else'}, the data has {', '.join(new) or 'nothing else'}, in this order or "
        "another. Give the data it was trained with by --data.root",
        limit=2000,
    )
