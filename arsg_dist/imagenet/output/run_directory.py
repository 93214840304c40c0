"""Name and read the files of a run: settings, records, environment, classes.

They may be of somebody else's run: what is read is checked before it is used or shown.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from arsg_dist.safe_io.documents import parse_json, read_yaml
from arsg_dist.safe_io.files import MiB, inside, open_regular, read_text
from arsg_dist.safe_io.text import printable

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.yaml"
CLASSES = "classes.txt"
CURVE = "learning_curve.png"
CHECKPOINTS, TENSORBOARD, WEIGHTS, WANDB = "checkpoints", "tensorboard", "weights", "wandb"
LOCK = ".lock"
"""Held by the training that writes here; what a killed one leaves of it says nothing."""
_DIRECTORIES: Final = (CHECKPOINTS, TENSORBOARD, WEIGHTS, WANDB)

_RECORD_LIMIT: Final = 64 * 1024
_METRICS_LIMIT: Final = 1024 * MiB
_ENVIRONMENT_LIMIT: Final = 16 * MiB
_OF_AN_EPOCH: Final = (
    "epoch",
    "train_loss",
    "val_loss",
    "val_top1",
    "val_top5",
    "val_images",
    "images_per_second",
    "seconds",
)


def directory_of(run: Path, name: str) -> Path:
    """Return the path of a directory of a run, whether it exists or not.

    Args:
        run: directory of the run, which may be a link.
        name: `CHECKPOINTS`, `TENSORBOARD` or `WEIGHTS`.

    Raises:
        ValueError: it is a link: what a start writes and removes in it would be elsewhere.
    """
    path = inside(run, name)
    if path.is_symlink():
        raise ValueError(
            f"{path} is a link, which is not followed inside a run: put the directory itself there. To keep a run on "
            "another disk, make the run's own directory the link"
        )
    return path


def check_output(directory: Path, *, resume: bool) -> None:
    """Refuse a run that leads elsewhere.

    Raises:
        ValueError: a link is in the place of a directory that a start writes to, or of a file that a resume reads.
    """
    for name in _DIRECTORIES:
        directory_of(directory, name)
    for name in (CONFIG, METRICS, ENVIRONMENT) if resume else ():
        if os.path.lexists(directory / name):
            open_regular(directory / name).close()


def read_settings(directory: Path) -> dict[Any, Any]:
    """Read the settings of a run, unchecked but for being a mapping: else a ValueError."""
    settings = read_yaml(directory / CONFIG)
    if settings is None:  # empty: a start of an earlier version met a full disk
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{directory / CONFIG} is damaged: it is no mapping of settings")
    return settings


def read_config(directory: Path) -> dict[str, Any]:
    """Read a run's settings; those that are shown are checked.

    Args:
        directory: of the run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the settings are no YAML, or one that every run has is missing or of another kind.
    """
    config = read_settings(directory)
    _check_kinds(config, _SHOWN_SETTINGS, directory / CONFIG)
    return config


def read_environments(directory: Path) -> list[dict[str, Any]]:
    """Read what was saved at each of a run's last starts, the oldest first.

    Args:
        directory: of the run.

    Raises:
        ValueError: the file is none of ours.
    """
    path = directory / ENVIRONMENT
    try:
        starts = read_yaml(path, limit=_ENVIRONMENT_LIMIT) or []
    except FileNotFoundError:
        return []
    if not isinstance(starts, list):
        raise ValueError(f"{path} is damaged: it is no list of starts")
    for start in starts:
        _check_kinds(start, _SHOWN_OF_A_START, path)
    return starts


_SHOWN_SETTINGS: Final[dict[str, Any]] = {
    "model": str,
    "optimizer": {"type": str, "params": dict},
    "data": {"image_size": int, "augmentation": str},
    "engine": str,
    "world_size": int,
    "epochs": int,
    "batch_size": int,
}
_SHOWN_OF_A_START: Final[dict[str, Any]] = {
    "time": str,
    "command": list,
    "packages": dict,
    "device": str,
    "hosts": int,
    "seed": int,
    "data": str,
}


def _check_kinds(found: Any, kinds: Mapping[str, Any], path: Path, what: str = "") -> None:
    """Raise ValueError unless a mapping has these keys, and values of these kinds."""
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: {what or 'it'} is no mapping")
    for key, kind in kinds.items():
        if key not in found:
            raise ValueError(f"{path} lacks {what}{key}")
        value = found[key]
        if isinstance(kind, dict):
            _check_kinds(value, kind, path, f"{what}{key}.")
        elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{path} is damaged: {what}{key} is {printable(value, limit=100)!r}")


def read_classes(directory: Path) -> list[str]:
    """Read the names of a run's classes.

    Args:
        directory: of the run.

    Raises:
        FileNotFoundError: there is no list of them.
        ValueError: it is no text, or no regular file.
    """
    return read_text(directory / CLASSES).splitlines()


def read_metrics(directory: Path) -> Iterator[dict[str, Any]]:
    """Read a run's records one by one, without a last one that a crash cut off.

    Each has a `kind`, an `update`, and numbers; those of the kind "epoch" have what a finished epoch has.

    Args:
        directory: of the run; none is fine.

    Raises:
        ValueError: a line that is no such record, or a file larger than any run's.
    """
    path = directory / METRICS
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        number, total = 0, 0
        while line := file.readline(_RECORD_LIMIT + 1):
            number, total = number + 1, total + len(line)
            if len(line) > _RECORD_LIMIT or total > _METRICS_LIMIT:
                raise ValueError(
                    f"{path} is damaged: line {number} is longer than a record, or the file than a run's"
                )
            try:
                record = _record(line)
            except ValueError as error:
                if not file.read(1):
                    return
                raise ValueError(
                    f"{path} is damaged in line {number}: {printable(error)}; remove the line if the others are good"
                ) from error
            yield record


def _record(line: bytes) -> dict[str, Any]:
    record = parse_json(line.decode(), "it")
    if not isinstance(record, dict):
        raise ValueError("it is no record")
    kind, update = record.get("kind"), record.get("update")
    if not isinstance(kind, str) or not isinstance(update, int) or isinstance(update, bool) or update < 0:
        raise ValueError("a record has a kind and the number of its update")
    for key, value in record.items():
        if key != "kind" and not (
            isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)
        ):
            raise ValueError(f"{key!r} is {printable(value, limit=100)!r} and no number")
    if kind == "epoch":
        if missing := [key for key in _OF_AN_EPOCH if key not in record]:
            raise ValueError(f"the record of an epoch lacks {missing[0]!r}")
        if not all(isinstance(record[key], int) for key in ("epoch", "val_images")):
            raise ValueError("epochs and images are counted in whole numbers")
    return record
