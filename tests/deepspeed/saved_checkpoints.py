"""Checkpoints that a job saved, converted, for several test files; each job runs once."""

import atexit
import functools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.checkpoint import ds_to_universal

from arsg_dist.deepspeed.universal import convert
from tests.deepspeed.checkpoint_cases import kept_cases
from tests.support.launchers import Finished, launch


@functools.cache
def saved_by(ranks: int, selection: str) -> tuple[Finished, Path]:
    """Runs the job; the directory has its results in `saved.pt`, and a folder for each configuration."""
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    job = launch(
        "warm deepspeed",
        ranks,
        "tests/deepspeed/jobs/checkpoints.py",
        directory,
        selection,
        timeout=500,
    )
    return job, directory


def results_saved_by(ranks: int, selection: str) -> dict[str, Any]:
    """What the job saw."""
    job, directory = saved_by(ranks, selection)
    assert job.code == 0, job.output[-5000:]
    results: dict[str, Any] = torch.load(directory / "saved.pt", weights_only=True)
    return results


@functools.cache
def converted(ranks: int, selection: str) -> Path:
    """The same with every checkpoint converted, beside its original, and some by DeepSpeed's own converter."""
    results_saved_by(ranks, selection)
    directory = saved_by(ranks, selection)[1]
    for config in kept_cases(selection):
        convert(directory / str(config), directory / str(config) / "universal")
        if selection == "core" and str(config) in ("zero1-fp32", "zero3-fp32", "zero3-fp32-one"):
            _convert_by_deepspeed(directory / str(config), directory / f"{config}-lost")
        if selection == "core" and str(config) == "zero1-fp32":
            without_state = shutil.ignore_patterns("*exp_avg*", "step.pt")
            shutil.copytree(directory / str(config), directory / f"{config}-stateless", ignore=without_state)
    return directory


def _convert_by_deepspeed(source: Path, target: Path) -> None:
    """By its command, in this process, which has imported it."""
    target.mkdir()
    tag = (source / "latest").read_text()
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    folders = ["--input_folder", str(source / tag), "--output_folder", str(target / "universal")]
    with mock.patch.object(sys, "argv", ["ds_to_universal", *folders, *workers, "--inject_missing_state"]):
        ds_to_universal.main(ds_to_universal.parse_arguments())


@functools.cache
def resumed_on(ranks: int, saved_on: int, selection: str) -> tuple[Finished, dict[str, Any], Path]:
    """Resumes on another number of ranks; results, and the directory with what was saved again."""
    directory = converted(saved_on, selection)
    script = "tests/deepspeed/jobs/universal.py"
    job = launch("warm deepspeed", ranks, script, directory, selection, timeout=590)
    output = directory / f"resumed{ranks}.pt"
    return job, torch.load(output, weights_only=True) if output.exists() else {}, directory
