"""Search a learning rate for each optimizer, train it with further seeds, and write the table.

    python -m benchmarks.imagenet_like --cifar10 PATH --output runs/imagenet_like

`--cifar10` is a tree train/CLASS/*.jpg, test/CLASS/*.jpg, or a tar file of it; nothing is downloaded. Every run is
one of `arsg-imagenet train --config base.yaml --config OPTIMIZER.yaml`; one that was interrupted goes on, and one that
is done is not done again. `--minutes 8` starts no run after eight minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.output.run_directory import read_metrics
from benchmarks.common.kept_results import machine_results, write_report
from benchmarks.common.machine import device_name

HERE = Path(__file__).parent
LEARNING_RATES = {
    "sgd": (0.01, 0.04, 0.16),
    "adamw": (2.5e-4, 1e-3, 4e-3),
    "arsg": (5e-3, 0.02, 0.08),
}
"""Where the search begins, for batches of 32: as many for each, `FACTOR` between them, around a scaled usual value."""
FACTOR, MOST_BEYOND = 4, 2
NAMES = {"sgd": "SGD", "adamw": "AdamW", "arsg": "ARSG"}
SEARCH_SEED = 0


@dataclass(frozen=True)
class Protocol:
    """What all runs have in common; a table is of one of them.

    Attributes:
        model: of `arsg-imagenet`.
        side: height and width of training and validation images, pixels.
        train_images: per class, the first ones by name.
        val_images: per class.
        batch: images per update.
        epochs: of a run.
        search_epochs: of a run that tries a learning rate.
        seeds: how many a chosen learning rate is trained with.
    """

    model: str
    side: int
    train_images: int
    val_images: int
    batch: int
    epochs: int
    search_epochs: int
    seeds: int


@dataclass(frozen=True)
class Run:
    """One start of the program."""

    optimizer: str
    lr: float
    seed: int
    epochs: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.optimizer}_lr{self.lr:g}_seed{self.seed}_epochs{self.epochs}"


def _images(source: Path) -> Iterator[tuple[str, str, str, IO[bytes]]]:
    """Yield split, class, name and content of every image, in order of their names where it is a tree."""
    if source.is_dir():
        for path in sorted(source.glob("t*/*/*.jpg")):
            with path.open("rb") as file:
                yield path.parts[-3], path.parts[-2], path.name, file
        return
    with tarfile.open(source) as archive:
        for member in archive:
            found = re.fullmatch(r"(?:\./)?(train|test)/(\w+)/(\w+\.jpe?g)", member.name)
            content = archive.extractfile(member) if found else None
            if found and content:
                yield found[1], found[2], found[3], content


def make_tree(source: Path, tree: Path, protocol: Protocol) -> None:
    """Write the images that the protocol takes as an ImageFolder tree with the splits train and val."""
    if tree.exists():
        return
    making = tree.with_name(tree.name + ".part")
    shutil.rmtree(making, ignore_errors=True)
    wanted = {"train": ("train", protocol.train_images), "test": ("val", protocol.val_images)}
    counts: dict[tuple[str, str], int] = {}
    for split, label, name, content in _images(source):
        target, most = wanted[split]
        counts[target, label] = counts.get((target, label), 0) + 1
        if counts[target, label] <= most:
            path = making / target / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    for target, most in wanted.values():
        found = {label: count for (split, label), count in counts.items() if split == target}
        if not found or min(found.values()) < most:
            sys.exit(f"{source} has not {most} images of every class for {target}: {found or 'none at all'}")
    making.rename(tree)


def arguments_of(run: Run, protocol: Protocol, tree: Path, output: Path) -> list[str]:
    """Return the command line of `arsg-imagenet train`."""
    return [
        *("--config", str(HERE / "base.yaml"), "--config", str(HERE / f"{run.optimizer}.yaml")),
        *("--data.root", str(tree), "--data.image_size", str(protocol.side), "--model", protocol.model),
        *("--batch_size", str(protocol.batch), "--epochs", str(run.epochs), "--seed", str(run.seed)),
        *("--optimizer.params.lr", repr(run.lr), "--output", str(output / run.name), "--resume", "auto"),
    ]


def epochs_of(directory: Path) -> list[dict[str, Any]]:
    """Return the records of a run's epochs, or nothing where there is no run."""
    try:
        return [record for record in read_metrics(directory) if record["kind"] == "epoch"]
    except (FileNotFoundError, NotADirectoryError):
        return []


def carry_out(
    run: Run, protocol: Protocol, tree: Path, output: Path, deadline: float
) -> list[dict[str, Any]]:
    """Train if it has not been done, and return the records of the epochs."""
    records = epochs_of(output / run.name)
    if len(records) < run.epochs:
        if time.monotonic() > deadline:
            sys.exit("no time for a further run: call again to go on")
        print(f"{time.strftime('%H:%M:%S')} {run.name}", flush=True)
        code = train_command(arguments_of(run, protocol, tree, output))
        if code:
            sys.exit(code)
        records = epochs_of(output / run.name)
    return records


def choose(trials: dict[float, float]) -> float:
    """Return the learning rate with the lowest of what each gave; one that is no number never wins."""
    return min(trials, key=lambda lr: (not math.isfinite(trials[lr]), trials[lr]))


def search(begin: Iterable[float], error: Callable[[float], float]) -> dict[float, float]:
    """Return the error of every learning rate tried: those given and, while the best is an end, up to two beyond it."""
    trials = {lr: error(lr) for lr in begin}
    for _ in range(MOST_BEYOND):
        best = choose(trials)
        if best not in (min(trials), max(trials)):
            break
        beyond = best / FACTOR if best == min(trials) else best * FACTOR
        trials[beyond] = error(beyond)
    return dict(sorted(trials.items()))


def paired(ours: Iterable[float], theirs: Iterable[float]) -> tuple[float, float]:
    """Return the mean of the differences of seeds and half of its 95 % interval (Student's t)."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    factor = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[len(differences)]
    return statistics.fmean(differences), factor * statistics.stdev(differences) / len(differences) ** 0.5


def table(
    protocol: Protocol,
    results: list[dict[str, Any]],
    trials: dict[str, dict[float, float]],
    device: str,
    raw: str,
) -> str:
    """Return the report in Markdown."""
    chosen = {name: choose(errors) for name, errors in trials.items()}

    def last(name: str, key: str) -> list[float]:
        return [
            result["epochs"][-1][key]
            for result in results
            if result["optimizer"] == name and result["kind"] == "final"
        ]

    def spread(values: list[float], scale: float = 1) -> str:
        return f"{scale * statistics.fmean(values):.3f} ({', '.join(f'{scale * x:.3f}' for x in values)})"

    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asdict(protocol).items())
    updates = math.ceil(10 * protocol.train_images / protocol.batch)
    lines = [
        f"# The ImageNet recipe on CIFAR-10 as JPEGs: {protocol.model}, {protocol.side} pixels",
        "",
        f"{10 * protocol.train_images:,} training and {10 * protocol.val_images:,} validation images, "
        f"batch {protocol.batch}, {protocol.epochs} epochs of {updates} updates, cosine with a warm-up of a quarter "
        f"of an epoch. Means over {protocol.seeds} seeds (each of them in brackets).",
        "",
        "| | lr tried, then chosen | training loss, last epoch | validation loss | validation top-1, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, tried in trials.items():
        lines.append(
            f"| {NAMES[name]} | {', '.join(f'{lr:g}' for lr in tried)}: {chosen[name]:g} "
            f"| {spread(last(name, 'train_loss'))} | {spread(last(name, 'val_loss'))} "
            f"| {spread(last(name, 'val_top1'), 100)} |"
        )
    lines += ["", "ARSG minus the other with the same seed, mean and 95 % interval (Student's t):", ""]
    for name in ("sgd", "adamw"):
        for key, what, unit in (("val_loss", "validation loss", 1), ("val_top1", "validation top-1, %", 100)):
            pairs = ([unit * value for value in last(one, key)] for one in ("arsg", name))
            mean, half = paired(*pairs)
            verdict = "no difference shown" if abs(mean) <= half else "lower" if mean < 0 else "higher"
            lines.append(f"- {what}, minus {NAMES[name]}: {mean:+.3f} ± {half:.3f} ({verdict})")
    edges = [NAMES[name] for name, tried in trials.items() if chosen[name] in (min(tried), max(tried))]
    lines += [
        "",
        "The learning rate of each is the one of those tried with the highest validation top-1 after "
        f"{protocol.search_epochs} epoch(s) with seed {SEARCH_SEED}: three, and up to {MOST_BEYOND} beyond them "
        "while the best is at an end"
        + (f"; it still is for {', '.join(edges)}" if edges else "")
        + ". The images that chose it are those validated on. All else is as in the recipes, not tuned.",
        "",
        f"[Numbers of all runs]({raw}); {device}, torch {torch.__version__}:",
        "",
        f"    python -m benchmarks.imagenet_like --cifar10 PATH {options}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Do what is missing of the runs and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar10", type=Path, required=True, help="tree or tar file of JPEGs")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/imagenet_like"), help="directory of the runs"
    )
    parser.add_argument(
        "--report",
        type=Path,
        help="Markdown file (default: benchmarks/results/MACHINE/imagenet_like/MODEL_SIDE_pixels.md)",
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--model", default="resnet18", help="(default: %(default)s)")
    for name, number, text in (
        ("--side", 32, "of images, pixels"),
        ("--train-images", 640, "per class"),
        ("--val-images", 50, "per class"),
        ("--batch", 32, "images per update"),
        ("--epochs", 2, "of a run"),
        ("--search-epochs", 1, "of a run of the search"),
        ("--seeds", 3, "after the search"),
    ):
        parser.add_argument(name, type=int, default=number, help=f"{text} (default: %(default)s)")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    protocol = Protocol(**{name: getattr(options, name) for name in Protocol.__dataclass_fields__})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.output.mkdir(parents=True, exist_ok=True)
    settings, kept = options.output / "protocol.json", asdict(protocol)
    if settings.exists() and json.loads(settings.read_text()) != kept:
        sys.exit(
            f"{options.output} holds runs of another protocol, {settings.read_text()}: choose another --output"
        )
    settings.write_text(json.dumps(kept))
    tree = options.output / "images"
    make_tree(options.cifar10, tree, protocol)

    results: list[dict[str, Any]] = []

    def records(kind: str, run: Run) -> list[dict[str, Any]]:
        epochs = carry_out(run, protocol, tree, options.output, deadline)
        results.append({"kind": kind, **asdict(run), "epochs": epochs})
        return epochs

    def searched(name: str) -> dict[float, float]:
        def error(lr: float) -> float:
            last = records("search", Run(name, lr, SEARCH_SEED, protocol.search_epochs))[-1]
            # Not by the loss: where a rate of SGD is too high, all classes are alike, and the loss log(10) is low.
            return 1 - float(last["val_top1"]) if math.isfinite(last["val_loss"]) else math.nan

        return search(LEARNING_RATES[name], error)

    trials = {name: searched(name) for name in LEARNING_RATES}
    for seed in range(
        1, protocol.seeds + 1
    ):  # all optimizers of a seed before the next: what is there is paired
        for name, errors in trials.items():
            records("final", Run(name, choose(errors), SEARCH_SEED + seed, protocol.epochs))
    name = f"{protocol.model}_{protocol.side}_pixels.md"
    report = options.report or machine_results(device) / "imagenet_like" / name
    raw = report.with_suffix(".json")
    write_report(report, table(protocol, results, trials, device_name(device), raw.name))
    numbers = {"protocol": kept, "device": device_name(device), "torch": torch.__version__, "runs": results}
    raw.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
