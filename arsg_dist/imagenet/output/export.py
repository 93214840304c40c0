"""Export a run's weights for other programs, with a model card.

The run may be somebody else's, and what is exported may be published: no link in it is followed, and text of the run
stands in the card as text, not as Markdown or as code.
"""

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arsg_dist.imagenet.data.transforms import val_resize
from arsg_dist.imagenet.models import TIMM
from arsg_dist.imagenet.output.run_directory import (
    CLASSES,
    CONFIG,
    METRICS,
    WEIGHTS,
    directory_of,
    read_classes,
    read_config,
    read_environments,
    read_metrics,
)
from arsg_dist.imagenet.output.weights import BEST, EMA, LAST, POINTS, read_metadata
from arsg_dist.safe_io.documents import dump_yaml
from arsg_dist.safe_io.files import open_regular, read_text, write_text, writing
from arsg_dist.safe_io.text import printable

EXPORTED = "model.safetensors"
CARD = "README.md"


@dataclass(frozen=True)
class Extra:
    """A file that an export has besides.

    Attributes:
        name: of the file.
        write: makes it, at a path.
        loading: Python that loads it, for the card.
    """

    name: str
    write: Callable[[Path], None]
    loading: list[str]


def export(
    run: Path, output: Path, weights: str = BEST, besides: Callable[[Path], list[Extra]] | None = None
) -> Path:
    """Copy a run's weights, with model card, settings and class names.

    Args:
        run: directory of a run with at least one finished epoch.
        output: directory to make; must not exist, or be empty.
        weights: "best" (highest validation accuracy), "last" or "ema".
        besides: checks the run's file of weights, and says what else to make of it.

    Returns:
        Path of the weights.

    Raises:
        ValueError: no such run or weights, one with links or damaged files, or an output that holds something.
        OSError: a file cannot be read or written.
    """
    source = directory_of(run, WEIGHTS) / f"{weights}.safetensors"
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} holds no run (no {CONFIG})")
    if not source.is_file():
        present = [name for name in (BEST, EMA, LAST) if source.with_name(f"{name}.safetensors").is_file()]
        raise ValueError(
            f"{run} has no weights {weights!r}; it has {', '.join(present)}"
            if present
            else f"{run} has no weights yet: they are written when an epoch is finished"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} is not an empty directory; choose another one")
    extras = besides(source) if besides else []
    card = _card(run, {EXPORTED: source}, extras)
    copied = {name: read_text(run / name) for name in (CONFIG, CLASSES)}
    output.mkdir(parents=True, exist_ok=True)
    with open_regular(source) as original, writing(output / EXPORTED) as copy:
        shutil.copyfileobj(original, copy)
    for extra in extras:
        extra.write(output / extra.name)
    for name, text in {**copied, CARD: card}.items():
        write_text(output / name, text)
    return output / EXPORTED


def write_model_card(run: Path) -> Path:
    """Write the card of a run's weights beside them.

    Args:
        run: directory of the run.

    Returns:
        Path of the card.

    Raises:
        ValueError: a file of the run is none of ours.
        OSError: it cannot be written.
    """
    directory = directory_of(run, WEIGHTS)
    files = {f"{name}.safetensors": directory / f"{name}.safetensors" for name in (BEST, LAST, EMA)}
    write_text(directory / CARD, _card(run, {name: file for name, file in files.items() if file.is_file()}))
    return directory / CARD


def _card(run: Path, files: dict[str, Path], extras: Sequence[Extra] = ()) -> str:
    config = read_config(run)
    model = config["model"]
    if not _MODEL.fullmatch(model):
        raise ValueError(f"{run / CONFIG} names no model: {printable(model, limit=100)!r}")
    epochs = [record for record in read_metrics(run) if record["kind"] == "epoch"]
    starts = read_environments(run)
    classes = read_classes(run)
    first = next(iter(files))
    lines = [
        f"# {_code(model)}, {len(classes)} classes, trained with {_code(config['optimizer']['type'])}",
        "",
        "| file | epoch | validation top-1 | weights |",
        "|---|---|---|---|",
    ]
    for name, file in files.items():
        about = read_metadata(file)
        kind = POINTS[about["weights"]]
        lines.append(f"| {name} | {about['epoch']} | {about['val_top1']:.2%} | {kind} |")
    lines += [
        "",
        f"Validation: {epochs[-1]['val_images']:,} images, each counted once." if epochs else "",
        "",
        *_fenced("python", _loading(model, len(classes), first)),
        "",
        *(line for extra in extras for line in (f"{extra.name}:", "", *_fenced("python", extra.loading), "")),
        "## Input",
        "",
        f"RGB, {config['data']['image_size']} × {config['data']['image_size']} pixels, scaled to 0 … 1, mean "
        "(0.485, 0.456, 0.406), standard deviation (0.229, 0.224, 0.225); "
        + (
            f"resized to {val_resize(config['data']['image_size'])} and centre-cropped."
            if config["data"]["augmentation"] == "imagenet"
            else "resized."
        )
        + " Classes in the order of `classes.txt`.",
        "",
        "## Training",
        "",
        f"- engine {_code(config['engine'])}, {config['world_size']} ranks, {config['epochs']} epochs asked for, "
        f"{epochs[-1]['epoch'] if epochs else 0} done, batch {config['batch_size']}",
    ]
    if epochs:
        rates = sorted(record["images_per_second"] for record in epochs)
        lines.append(
            f"- throughput: {rates[len(rates) // 2]:,.1f} images/s over all ranks (median epoch, training only); "
            f"wall time {epochs[-1]['seconds'] / 3600:.2f} h"
        )
    lines += [_start(start) for start in starts]
    if starts:
        packages = starts[-1]["packages"].items()
        lines.append("- " + ", ".join(_code(f"{name} {version}") for name, version in packages))
    settings = dump_yaml(config).splitlines()
    lines += ["", "## Settings", "", *_fenced("yaml", settings), ""]
    lines.append(f"Records of every epoch: {METRICS} of the run {_code(run.name)}.")
    return "\n".join(lines) + "\n"


_MODEL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|timm:[A-Za-z0-9_.-]+")


def _start(start: dict[str, Any]) -> str:
    git, revision = start.get("git"), "no checkout"
    if isinstance(git, dict):
        # Starts of earlier versions say whether files were changed, later ones the digest of the code.
        revision = f"{_code(git.get('revision'))}{' with changes' if git.get('changed') else ''}"
    if "code" in start:
        revision += f", code {_code(str(start['code'])[:12])}"
    return (
        f"- started {_code(start['time'])} on {_code(start['device'])}, {start['hosts']} hosts, seed {start['seed']}, "
        f"git {revision}: {_code(shlex.join(map(str, start['command'])), limit=4000)}"
    )


def _code(text: object, *, limit: int = 200) -> str:
    """Write text of a run as a code span, in which Markdown has no meaning."""
    shown = printable(text, limit=limit)
    ticks = _longer_than_any("`", 1, shown)
    inner = f" {shown} " if shown[:1] in ("`", " ", "") or shown[-1:] == "`" else shown
    return f"{ticks}{inner}{ticks}"


def _fenced(language: str, lines: list[str]) -> list[str]:
    """Write a block of code that nothing in it can end."""
    fence = _longer_than_any("`", 3, "\n".join(lines))
    return [fence + language, *lines, fence]


def _longer_than_any(character: str, least: int, text: str) -> str:
    longest = max((len(run) for run in re.findall(f"{re.escape(character)}+", text)), default=0)
    return character * max(least, longest + 1)


def _loading(model: str, num_classes: int, file: str) -> list[str]:
    """Write Python that builds a model of `_MODEL` and loads a file of ours."""
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
            f"model = timm.create_model({model.removeprefix(TIMM)!r}, num_classes={num_classes})",
        ]
    else:
        build = [
            "try:",
            "    import torchvision",
            "except RuntimeError:  # a CUDA build of it beside a torch without CUDA",
            "    from arsg_dist.imagenet.torchvision_compat import torchvision",
            "",
            f"model = torchvision.models.{model}(num_classes={num_classes})",
        ]
    return ["from safetensors.torch import load_file", *build, f'model.load_state_dict(load_file("{file}"))']
