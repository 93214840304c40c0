"""What a job on ranks found, which runs once for all tests of a process."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.support.launchers import Finished, launch


@functools.cache
def _finished(launcher: str, ranks: int, job: str, *arguments: str) -> tuple[Finished, Any]:
    with tempfile.TemporaryDirectory() as directory:
        script, output = f"tests/{job}.py", Path(directory) / "results.pt"
        finished = launch(launcher, ranks, script, directory, *arguments, timeout=550)
        return finished, torch.load(output, weights_only=True) if output.exists() else {}


def results_of(launcher: str, ranks: int, job: str, *arguments: str) -> dict[str, Any]:
    """Run a job with a directory as its first argument; return what it wrote there into results.pt.

    Also if it fails it runs once, and every test that asks for it fails.

    Args:
        launcher: see `launch`.
        ranks: how many.
        job: below the tests, as "deepspeed/jobs/matrix".
        arguments: more of the job's.
    """
    finished, results = _finished(launcher, ranks, job, *arguments)
    assert finished.code == 0, finished.output[-5000:]
    found: dict[str, Any] = results
    return found
