"""Compare several runs, over epochs and over wall time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arsg_dist.imagenet.output.run_directory import CONFIG, read_config, read_environments, read_metrics
from arsg_dist.imagenet.output.run_log import plot_label
from arsg_dist.safe_io.files import replacing
from arsg_dist.safe_io.text import printable

PICTURE = "comparison.png"


@dataclass(frozen=True)
class Run:
    """A run as its directory tells it.

    Attributes:
        name: shown; the directory's name, or its path where names are equal, on one line.
        config: resolved settings.
        epochs: records of its finished epochs, at least one.
        data: fingerprint of its data; None if not recorded.
    """

    name: str
    config: dict[str, Any]
    epochs: list[dict[str, Any]]
    data: str | None


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Read the runs to be compared.

    Raises:
        ValueError: a directory that holds no run, one with damaged files, or a run without a finished epoch; all of
            them are named.
    """
    problems, runs = [], []
    names = [directory.resolve().name for directory in directories]
    for directory, name in zip(directories, names, strict=True):
        try:
            config = read_config(directory)
            epochs = [record for record in read_metrics(directory) if record["kind"] == "epoch"]
            starts = read_environments(directory)
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{directory} holds no run (no {CONFIG})")
            continue
        except ValueError as error:
            problems.append(str(error))
            continue
        if not epochs:
            problems.append(f"{directory} has no finished epoch to compare")
            continue
        shown = printable(name if names.count(name) == 1 else directory, limit=200)
        runs.append(Run(shown, config, epochs, starts[-1]["data"] if starts else None))
    if problems:
        raise ValueError("\n".join(problems))
    return runs


def warnings(runs: Sequence[Run]) -> list[str]:
    """Say why the comparison may be none."""
    first, found = runs[0], []
    for run in runs[1:]:
        if run.data != first.data:
            found.append(
                f"{run.name} was trained on other data than {first.name}: their accuracies say little"
            )
        elif run.epochs[-1]["val_images"] != first.epochs[-1]["val_images"]:
            found.append(f"{run.name} was validated on another number of images than {first.name}")
    return found


def table(runs: Sequence[Run]) -> str:
    """Make a Markdown table, one row per run."""
    lines = [
        "| run | model | optimizer | engine, ranks | batch | epochs | best top-1 (epoch) | last top-1 | last val loss "
        "| last train loss | images/s | hours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        config, last = run.config, run.epochs[-1]
        best = max(run.epochs, key=lambda record: record["val_top1"])
        rates = sorted(record["images_per_second"] for record in run.epochs)
        optimizer = config["optimizer"]
        boosted = config.get("boost")
        boosted = boosted if isinstance(boosted, dict) else {}
        name = optimizer["type"] + ("B" if boosted.get("milestones") or boosted.get("plateau") else "")
        method = f"{name} {_numbers(optimizer['params'])}"
        lines.append(
            f"| {_cell(run.name)} | {_cell(config['model'])} | {_cell(method)} "
            f"| {_cell(config['engine'])}, {config['world_size']} | {config['batch_size']} "
            f"| {last['epoch']} of {config['epochs']} | {best['val_top1']:.2%} ({best['epoch']}) "
            f"| {last['val_top1']:.2%} | {last['val_loss']:.4f} | {last['train_loss']:.4f} "
            f"| {rates[len(rates) // 2]:,.0f} | {last['seconds'] / 3600:.3f} |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return printable(text, limit=200).replace("|", r"\|")


def _numbers(params: dict[str, Any]) -> str:
    return ", ".join(f"{key} {params[key]}" for key in ("lr", "mu", "eps", "weight_decay") if key in params)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw losses and accuracy of all runs, over epochs and over hours.

    Args:
        runs: to be drawn.
        path: of the picture; its suffix says the format, PNG without one.

    Raises:
        ValueError: a format that matplotlib does not have.
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.subplots(2, 3)
    for row, (label, quantity, unit) in zip(
        grid, (("epoch", "epoch", 1.0), ("hours", "seconds", 1 / 3600)), strict=True
    ):
        for axes, (key, title, scale) in zip(
            row,
            (
                ("train_loss", "training loss", 1.0),
                ("val_loss", "validation loss", 1.0),
                ("val_top1", "validation top-1, %", 100.0),
            ),
            strict=True,
        ):
            for run in runs:
                x = [unit * record[quantity] for record in run.epochs]
                y = [scale * record[key] for record in run.epochs]
                axes.plot(x, y, marker="o", markersize=2.5, linewidth=1.2, label=plot_label(run.name))
            axes.set(xlabel=label, ylabel=title)
            axes.grid(alpha=0.3)
            if key != "val_top1":
                axes.set_yscale("log")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(runs)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=130, format=path.suffix[1:] or "png")
