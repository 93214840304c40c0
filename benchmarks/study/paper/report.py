"""Tables, pictures and numbers of the studies; renews the generated parts of a document."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.paper.curves import Curve, read_curves
from benchmarks.study.paper.figures import draw
from benchmarks.study.paper.study import Study
from benchmarks.study.paper.tables import TABLES


def write_report(
    studies: list[Study], output: Path, device: str, results: Path, command: str, document: Path | None = None
) -> None:
    """Write `STUDY.md`, `STUDY.png` and `STUDY.json` for every study with a seed of which all runs are there.

    Args:
        studies: to report.
        output: directory of the curves.
        device: "cpu" or "cuda": which curves.
        results: directory to write to; pictures go to `images/study-paper` beside the document if there is one.
        command: that makes the runs; stands under every table.
        document: Markdown file; what is between `<!-- study NAME -->` and `<!-- end -->` is replaced.

    Raises:
        ValueError: the document has a part for no study.
    """
    pictures = document.parent / "images/study-paper" if document else results
    for directory in (results, pictures):
        directory.mkdir(parents=True, exist_ok=True)
    parts = {}
    for study in studies:
        curves = read_curves(study, output, device)
        if not curves:
            continue
        name = study.name if device == "cpu" else f"{study.name}_{device}"
        picture, numbers = pictures / f"{name}.png", results / f"{name}.json"
        draw(study, curves, picture)
        numbers.write_text(json.dumps(_numbers(study, curves, command), ensure_ascii=False))
        files = (numbers, picture)
        table = results / f"{name}.md"
        table.write_text(f"# {study.title}\n\n{_part(study, curves, command, table, *files)}")
        if document is not None:
            parts[name] = _part(study, curves, command, document, *files)
    if document is not None:
        document.write_text(renewed(document.read_text(), parts))


def renewed(text: str, parts: dict[str, str]) -> str:
    """The text with its generated parts replaced; parts without new content stay as they are."""
    return re.sub(
        r"(<!-- study (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{parts[found[2]]}\n{found[3]}" if found[2] in parts else found[0],
        text,
        flags=re.DOTALL,
    )


def _part(study: Study, curves: list[Curve], command: str, page: Path, numbers: Path, picture: Path) -> str:
    """Return what stands on a page: table, files, origin and picture."""
    done = f"{len(curves)} of {len(study.members)} runs" if len(curves) < len(study.members) else "all runs"
    links = [Path(os.path.relpath(path, page.parent)).as_posix() for path in (numbers, picture)]
    return (
        f"{TABLES[study.kind](study, curves)}\n\n{done} ([numbers]({links[0]})); {curves[0].device}, "
        f"torch {torch.__version__}:\n\n    {command} --only {study.name}\n\n![{study.title}]({links[1]})\n"
    )


def _numbers(study: Study, curves: list[Curve], command: str) -> dict[str, Any]:
    """What tables and pictures can be checked with: every run's settings and its losses per epoch."""
    return {
        "title": study.title,
        "device": curves[0].device,
        "torch": torch.__version__,
        "command": f"{command} --only {study.name}",
        "runs": [
            {
                "label": curve.label,
                "seed": curve.run.seed,
                "batch_size": curve.run.batch,
                "engine": curve.run.engine,
                "ranks": curve.run.ranks,
                "settings": curve.run.optimizer_settings(),
                "updates": len(curve.losses),
                "diverged": curve.diverged,
                "train_loss": [
                    round(sum(part) / len(part), 5)
                    for start in range(0, len(curve.losses), curve.updates_per_epoch)
                    for part in [curve.losses[start : start + curve.updates_per_epoch]]
                ],
                "val_loss": [round(record["val_loss"], 5) for record in curve.epochs],
                "val_accuracy": [record["val_accuracy"] for record in curve.epochs],
                "seconds": round(curve.epochs[-1]["seconds"], 1),
            }
            for curve in curves
        ],
    }
