"""Record a run while it trains: settings, metrics, learning curve."""

import json
import os
import secrets
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from arsg_dist.imagenet.output.run_directory import (
    CLASSES,
    CONFIG,
    CURVE,
    ENVIRONMENT,
    METRICS,
    TENSORBOARD,
    WANDB,
    read_environments,
    read_metrics,
    read_settings,
)
from arsg_dist.safe_io.documents import dump_yaml
from arsg_dist.safe_io.files import (
    append_text,
    make_directory,
    remove_partial_files,
    replacing,
    write_text,
    writing,
)
from arsg_dist.safe_io.text import printable

_STARTS_KEPT: Final = 200


class RunLog:
    """The records of a run, on rank 0: YAML, JSON lines, TensorBoard events.

    Args:
        directory: of the run; created if missing.
        config: resolved settings, written as YAML.
        resumed_updates: None for a new run, else the updates made so far: later records of the interrupted run are
            dropped, since they will be made again.
        resumed_epochs: whole epochs so far. The record of one more may be there already, with the same updates: it is
            written before the checkpoint that counts the epoch.
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
        resumed_epochs: int | None = None,
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
            before, now = _flat(read_settings(directory)), _flat(config)
            self.changed = [
                printable(f"{key}: {before.get(key)} → {now.get(key)}", limit=200)
                for key in [*now, *(before.keys() - now.keys())]
                if before.get(key) != now.get(key)
            ]
            self._keep_records(resumed_updates, resumed_epochs)
            purge_step = resumed_updates + 1
        starts = read_environments(directory)
        if wandb_project:
            known = [start["wandb_id"] for start in starts if "wandb_id" in start]
            environment = {**environment, "wandb_id": known[-1] if known else uuid.uuid4().hex[:16]}
        starts = [*starts[-_STARTS_KEPT:], environment]
        write_text(directory / ENVIRONMENT, dump_yaml(starts))
        write_text(directory / CLASSES, "".join(f"{name}\n" for name in classes))
        write_text(directory / CONFIG, dump_yaml(config))
        self._board = SummaryWriter(
            str(make_directory(directory, TENSORBOARD)),
            purge_step=purge_step,
            filename_suffix=f".{secrets.token_hex(8)}",  # so that nobody can have put a link at the file's name
        )
        self._wandb: Any = None
        if wandb_project:
            make_directory(directory, WANDB)
            self._wandb = import_wandb().init(
                project=wandb_project,
                name=directory.name,
                id=environment["wandb_id"],
                resume="allow",
                config=config,
                dir=str(directory),
            )

    def _keep_records(self, updates: int, epochs: int | None) -> None:
        """Drop what the interrupted run wrote after so many updates, and whole epochs."""
        with writing(self._metrics) as file:
            for record in read_metrics(self._directory):
                again = epochs is not None and record["kind"] == "epoch" and record["epoch"] > epochs
                if record["update"] <= updates and not again:
                    file.write(f"{json.dumps(record)}\n".encode())
                    self._seconds_before = record.get("seconds", 0.0)

    def write(self, kind: str, update: int, values: dict[str, float]) -> None:
        """Add a record; it gets `seconds`, the run's wall time over all its starts.

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
        """Draw the learning curve and close the files; return the picture's path."""
        self._board.close()
        if self._wandb:
            self._wandb.finish()
        return draw_learning_curve(self._directory)


def import_wandb() -> Any:
    """Import wandb, told to run no git here unless the user wants it to.

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
