"""What a run writes: its resolved config, JSON lines, TensorBoard events, a learning-curve picture, checkpoints."""

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

from arsg_dist.imagenet.whole_file import write_whole

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.yaml"
CLASSES = "classes.txt"
CURVE = "learning_curve.png"


def check_output(directory: Path, *, resume: bool) -> None:
    """Refuses to mix runs.

    Raises:
        ValueError: a new run into a directory that holds something, or a resume where there is no run.
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
            f"output directory {directory} is not empty (it has {holds[0]}); choose another --output"
        )


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
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._metrics = directory / METRICS
        purge_step = None
        self.changed: list[str] = []
        if resumed_updates is not None:
            # Empty where a start of an earlier version met a full disk.
            before = _flat(yaml.safe_load((directory / CONFIG).read_text()) or {})
            now = _flat(config)
            self.changed = [
                f"{key}: {before.get(key)} → {now.get(key)}"
                for key in [*now, *(before.keys() - now.keys())]
                if before.get(key) != now.get(key)
            ]
            kept = [record for record in read_metrics(directory) if record["update"] <= resumed_updates]
            write_whole(self._metrics, "".join(json.dumps(record) + "\n" for record in kept))
            purge_step = resumed_updates + 1
            self._seconds_before = kept[-1].get("seconds", 0.0) if kept else 0.0
        starts = read_environments(directory)
        if wandb_project:
            known = [start["wandb_id"] for start in starts if "wandb_id" in start]
            environment = {**environment, "wandb_id": known[-1] if known else uuid.uuid4().hex[:16]}
        write_whole(directory / ENVIRONMENT, yaml.safe_dump([*starts, environment], sort_keys=False))
        write_whole(directory / CLASSES, "".join(f"{name}\n" for name in classes))
        write_whole(directory / CONFIG, yaml.safe_dump(config, sort_keys=False))
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step)
        self._wandb: Any = None
        if wandb_project:
            self._wandb = import_wandb().init(
                project=wandb_project,
                name=directory.name,
                id=environment["wandb_id"],
                resume="allow",
                config=config,
                dir=str(directory),
            )

    def write(self, kind: str, update: int, values: dict[str, float]) -> None:
        """Adds a record; it gets `seconds`, the run's wall time over all its starts.

        Args:
            kind: "train" (a few updates) or "epoch" (with the validation).
            update: weight updates made so far.
            values: what was measured.
        """
        values = {**values, "seconds": self._seconds_before + time.perf_counter() - self._started}
        with self._metrics.open("a") as file:
            file.write(json.dumps({"kind": kind, "update": update, **values}) + "\n")
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


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def read_environments(directory: Path) -> list[dict[str, Any]]:
    """What was saved at each start of a run, the first first; empty if nothing was."""
    path = directory / ENVIRONMENT
    return list(yaml.safe_load(path.read_text()) or []) if path.is_file() else []


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line cut off by a crash is left out."""
    path = directory / METRICS
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def draw_learning_curve(directory: Path) -> Path:
    """Draws loss and accuracy over the epochs of a run into `directory` and returns the picture's path."""
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
    figure.suptitle(directory.name)
    path = directory / CURVE
    figure.savefig(path, dpi=130)
    return path
