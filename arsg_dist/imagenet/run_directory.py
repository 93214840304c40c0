"""What a run writes: its resolved config, JSON lines, TensorBoard events, a learning-curve picture, checkpoints.

Whatever is read here may be of somebody else's run: it is checked before it is used or shown.
"""

import json
import os
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from arsg_dist.safe_io.documents import parse_json, read_yaml
from arsg_dist.safe_io.files import (
    MiB,
    append_text,
    inside,
    make_directory,
    open_regular,
    read_text,
    remove_partial_files,
    replacing,
    write_text,
    writing,
)
from arsg_dist.safe_io.text import printable

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.yaml"
CLASSES = "classes.txt"
CURVE = "learning_curve.png"
CHECKPOINTS, TENSORBOARD, WEIGHTS = "checkpoints", "tensorboard", "weights"
_DIRECTORIES: Final = (CHECKPOINTS, TENSORBOARD, WEIGHTS, "wandb")

_RECORD_LIMIT: Final = 64 * 1024
_METRICS_LIMIT: Final = 1024 * MiB
_ENVIRONMENT_LIMIT: Final = 16 * MiB
_STARTS_KEPT: Final = 200
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
    """Refuse to mix runs, and a run that leads elsewhere.

    Raises:
        ValueError: a new run into a directory that holds something, a resume where there is no run, or one with a link
            in the place of a directory or of a file that a resume reads.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output {directory} is not a directory")
    holds = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if resume and CONFIG not in holds:
        raise ValueError(
            f"--resume: output directory {directory} holds no run; leave --resume out to start one"
        )
    if not resume and CONFIG in holds:
        raise ValueError(
            f"output directory {directory} already holds a run; continue it with --resume, or choose another --output"
        )
    if not resume and holds:
        raise ValueError(
            f"output directory {directory} is not empty (it has {printable(holds[0])}); choose another --output"
        )
    if resume:
        for name in _DIRECTORIES:
            directory_of(directory, name)
        for name in (CONFIG, METRICS, ENVIRONMENT):
            if name in holds:
                open_regular(directory / name).close()


class RunLog:
    """Writes a run's records; used on rank 0 only.

    Args:
        directory: of the run; created if missing.
        config: resolved settings, written as YAML.
        resumed_updates: None for a new run, else the updates made so far: later records of the interrupted run are
            dropped, since they will be made again.
        environment: of this start, as `environment.describe` gives it; added to those of earlier starts.
        classes: names of the classes in the order of the network's outputs.
        wandb_project: also log to this project of Weights & Biases. The id of the run there is kept in `ENVIRONMENT`:
            a resumed run continues its own, and a new one in the same place does not.

    Attributes:
        changed: settings that differ from those the resumed run had so far, as "key: old → new".

    Raises:
        ValueError: records of the resumed run that are none of ours.
        OSError: a file cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        *,
        resumed_updates: int | None,
        environment: dict[str, Any],
        classes: list[str],
        wandb_project: str | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._started, self._seconds_before = time.perf_counter(), 0.0
        make_directory(directory)
        self._directory = directory
        self._metrics = directory / METRICS
        purge_step = None
        self.changed: list[str] = []
        if resumed_updates is not None:
            remove_partial_files(directory)
            before, now = _flat(_settings(directory)), _flat(config)
            self.changed = [
                printable(f"{key}: {before.get(key)} → {now.get(key)}", limit=200)
                for key in [*now, *(before.keys() - now.keys())]
                if before.get(key) != now.get(key)
            ]
            self._keep_records(resumed_updates)
            purge_step = resumed_updates + 1
        starts = read_environments(directory)
        if wandb_project:
            known = [start["wandb_id"] for start in starts if "wandb_id" in start]
            environment = {**environment, "wandb_id": known[-1] if known else uuid.uuid4().hex[:16]}
        starts = [*starts[-_STARTS_KEPT:], environment]
        write_text(directory / ENVIRONMENT, yaml.safe_dump(starts, sort_keys=False))
        write_text(directory / CLASSES, "".join(f"{name}\n" for name in classes))
        write_text(directory / CONFIG, yaml.safe_dump(config, sort_keys=False))
        self._board = SummaryWriter(
            str(make_directory(directory, TENSORBOARD)),
            purge_step=purge_step,
            filename_suffix=f".{secrets.token_hex(8)}",  # so that nobody can have put a link at the file's name
        )
        self._wandb: Any = None
        if wandb_project:
            make_directory(directory, "wandb")
            self._wandb = import_wandb().init(
                project=wandb_project,
                name=directory.name,
                id=environment["wandb_id"],
                resume="allow",
                config=config,
                dir=str(directory),
            )

    def _keep_records(self, updates: int) -> None:
        """Drop what the interrupted run wrote after so many updates."""
        with writing(self._metrics) as file:
            for record in read_metrics(self._directory):
                if record["update"] <= updates:
                    file.write(f"{json.dumps(record)}\n".encode())
                    self._seconds_before = record.get("seconds", 0.0)

    def write(self, kind: str, update: int, values: dict[str, float]) -> None:
        """Adds a record; it gets `seconds`, the run's wall time over all its starts.

        Args:
            kind: "train" (a few updates) or "epoch" (with the validation).
            update: weight updates made so far.
            values: what was measured.
        """
        values = {**values, "seconds": self._seconds_before + time.perf_counter() - self._started}
        append_text(self._metrics, json.dumps({"kind": kind, "update": update, **values}) + "\n")
        if self._wandb:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=update)
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, update)

    def close(self) -> Path:
        """Draws the learning curve and closes the files; returns the picture's path."""
        self._board.close()
        if self._wandb:
            self._wandb.finish()
        return draw_learning_curve(self._directory)


def import_wandb() -> Any:
    """The package of Weights & Biases, told not to run git in the current directory unless the user wants it to.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("WANDB_DISABLE_GIT", "true")
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "wandb_project needs the package wandb: pip install wandb, or leave the setting out"
        ) from error
    return wandb


def _flat(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _settings(directory: Path) -> dict[Any, Any]:
    settings = read_yaml(directory / CONFIG)
    if settings is None:  # empty: a start of an earlier version met a full disk
        return {}
    if not isinstance(settings, dict):
        raise ValueError(f"{directory / CONFIG} is damaged: it is no mapping of settings")
    return settings


def read_config(directory: Path) -> dict[str, Any]:
    """Read the settings of a run as far as they are shown, checked; what else is in it is kept as it is.

    Args:
        directory: of the run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the settings are no YAML, or one that every run has is missing or of another kind.
    """
    config = _settings(directory)
    _check_kinds(config, _SHOWN_SETTINGS, directory / CONFIG)
    return config


def read_environments(directory: Path) -> list[dict[str, Any]]:
    """Read what was saved at each of the last starts of a run, the oldest first; empty if nothing was.

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
    """Raise ValueError unless there is a mapping with such keys, and values of these types or mappings."""
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
    """Read the records of a run one after another; a last one cut off by a crash is left out.

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


def plot_label(name: str) -> str:
    """Return a name as matplotlib writes it, without its mathematics."""
    return printable(name, limit=100).replace("$", r"\$")


def draw_learning_curve(directory: Path) -> Path:
    """Draw loss and accuracy over the epochs of a run into its directory.

    Args:
        directory: of the run.

    Returns:
        Path of the picture.

    Raises:
        ValueError: the run's records are none of ours.
        OSError: the picture cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    epochs = [record for record in read_metrics(directory) if record["kind"] == "epoch"]
    x = [record["epoch"] for record in epochs]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for key, label in (("train_loss", "training"), ("val_loss", "validation")):
        loss_axes.plot(x, [record[key] for record in epochs], marker="o", markersize=3, label=label)
    for key, label in (("val_top1", "top-1"), ("val_top5", "top-5")):
        accuracy_axes.plot(x, [100 * record[key] for record in epochs], marker="o", markersize=3, label=label)
    loss_axes.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    accuracy_axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(plot_label(directory.name))
    path = directory / CURVE
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130)
    return path
