"""Weights of a run for other programs, with a model card: `arsg-imagenet export RUN --output DIR`."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml

from arsg_dist.imagenet.models import TIMM
from arsg_dist.imagenet.run_directory import CLASSES, CONFIG, METRICS, read_environments, read_metrics
from arsg_dist.imagenet.weights import BEST, DIRECTORY, EMA, LAST, read_metadata
from arsg_dist.imagenet.whole_file import write_whole

WEIGHTS = "model.safetensors"
CARD = "README.md"


def export(run: Path, output: Path, weights: str = BEST) -> Path:
    """Copies a run's weights into a directory of their own, with model card, settings and class names.

    Args:
        run: directory of a run with at least one finished epoch.
        output: directory to make; must not exist, or be empty.
        weights: "best" (highest validation accuracy), "last" or "ema".

    Returns:
        Path of the weights.

    Raises:
        ValueError: no such run or weights, or an output that holds something.
    """
    source = run / DIRECTORY / f"{weights}.safetensors"
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} holds no run (no {CONFIG})")
    if not source.is_file():
        present = sorted(path.stem for path in (run / DIRECTORY).glob("*.safetensors"))
        raise ValueError(
            f"{run} has no weights {weights!r}; it has {', '.join(present)}"
            if present
            else f"{run} has no weights yet: they are written when an epoch is finished"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} is not an empty directory; choose another one")
    output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, output / WEIGHTS)
    for name in (CONFIG, CLASSES):
        shutil.copyfile(run / name, output / name)
    (output / CARD).write_text(_card(run, {WEIGHTS: source}))
    return output / WEIGHTS


def write_model_card(run: Path) -> Path:
    """Writes the card of a run's weights beside them; returns its path."""
    files = {f"{name}.safetensors": run / DIRECTORY / f"{name}.safetensors" for name in (BEST, LAST, EMA)}
    path = run / DIRECTORY / CARD
    write_whole(path, _card(run, {name: file for name, file in files.items() if file.is_file()}))
    return path


def _card(run: Path, files: dict[str, Path]) -> str:
    config: dict[str, Any] = yaml.safe_load((run / CONFIG).read_text())
    epochs = [record for record in read_metrics(run) if record["kind"] == "epoch"]
    starts = read_environments(run)
    classes = (run / CLASSES).read_text().splitlines()
    first = next(iter(files))
    lines = [
        f"# {config['model']}, {len(classes)} classes, trained with {config['optimizer']['type']}",
        "",
        "| file | epoch | validation top-1 | weights |",
        "|---|---|---|---|",
    ]
    for name, file in files.items():
        about = read_metadata(file)
        kind = _KINDS[about["weights"]]
        lines.append(f"| {name} | {about['epoch']} | {about['val_top1']:.2%} | {kind} |")
    lines += [
        "",
        f"Validation: {epochs[-1]['val_images']:,} images, each counted once." if epochs else "",
        "",
        "```python",
        *_loading(config["model"], len(classes), first),
        "```",
        "",
        "## Input",
        "",
        f"RGB, {config['data']['image_size']} × {config['data']['image_size']} pixels, scaled to 0 … 1, mean "
        "(0.485, 0.456, 0.406), standard deviation (0.229, 0.224, 0.225); "
        + (
            f"resized to {round(config['data']['image_size'] * 256 / 224)} and centre-cropped."
            if config["data"]["augmentation"] == "imagenet"
            else "resized."
        )
        + " Classes in the order of `classes.txt`.",
        "",
        "## Training",
        "",
        f"- engine {config['engine']}, {config['world_size']} ranks, {config['epochs']} epochs asked for, "
        f"{epochs[-1]['epoch'] if epochs else 0} done, batch {config['batch_size']}",
    ]
    if epochs:
        rates = sorted(record["images_per_second"] for record in epochs)
        lines.append(
            f"- throughput: {rates[len(rates) // 2]:,.1f} images/s over all ranks (median epoch, training only); "
            f"wall time {epochs[-1]['seconds'] / 3600:.2f} h"
        )
    for start in starts:
        git = start["git"]
        # Starts of earlier versions say whether files were changed, later ones the digest of the code.
        changes = " with changes" if git and git.get("changed") else ""
        revision = f"{git['revision']}{changes}" if git else "no checkout"
        revision += f", code {start['code'][:12]}" if "code" in start else ""
        lines += [
            f"- started {start['time']} on {start['device']}, {start['hosts']} hosts, seed {start['seed']}, "
            f"git {revision}: `{shlex.join(start['command'])}`",
        ]
    if starts:
        lines.append(
            "- " + ", ".join(f"{name} {version}" for name, version in starts[-1]["packages"].items())
        )
    lines += ["", "## Settings", "", "```yaml", yaml.safe_dump(config, sort_keys=False).rstrip(), "```", ""]
    lines.append(f"Records of every epoch: {METRICS} of the run `{run.name}`.")
    return "\n".join(lines) + "\n"


_KINDS = {"x": "as trained (observation point x)", "theta": "base iterate θ", "ema": "moving average (EMA)"}


def _loading(model: str, num_classes: int, file: str) -> list[str]:
    if model == "resnet20":
        build = [
            "from arsg_dist.imagenet.models import build_model",
            "",
            f'model = build_model("resnet20", {num_classes})',
        ]
    elif model.startswith(TIMM):
        build = [
            "import timm",
            "",
            f'model = timm.create_model("{model.removeprefix(TIMM)}", num_classes={num_classes})',
        ]
    else:
        build = ["import torchvision", "", f"model = torchvision.models.{model}(num_classes={num_classes})"]
    return ["from safetensors.torch import load_file", *build, f'model.load_state_dict(load_file("{file}"))']
