"""The script that docs/own-scripts.md shows, on every engine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arsg_dist.checkpoint import SavedRun
from tests.support.compare import assert_same_weights
from tests.support.engines import ENGINES, ON_RANKS
from tests.support.launchers import REPOSITORY, launch

SCRIPT = "examples/own_script.py"


def alone(output: Path, updates: int) -> str:
    finished = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            "--output",
            str(output),
            "--updates",
            str(updates),
            "--checkpoint_every",
            "10",
        ],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def weights_after(output: Path, updates: int) -> dict[str, torch.Tensor]:
    saved = SavedRun(output / "checkpoints" / f"step-{updates:09d}")
    return {name: saved.read("parameter", name) for name in saved.parameters}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Twenty updates of one process, with a checkpoint after ten."""
    output = tmp_path_factory.mktemp("one_process")
    return output, alone(output, 20)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=pytest.mark.turn(n % 3)) for n, name in enumerate(ON_RANKS)]
)
def test_it_trains_as_one_process_and_resumes(engine: str, one_process, tmp_path: Path) -> None:
    """Catches lines for an engine that train something else, or lose the schedule or the state at a resume."""
    expected, said = one_process
    arguments = ["--engine", engine, "--output", tmp_path, "--checkpoint_every", 10]
    stopped = launch(ENGINES[engine].warm, 2, SCRIPT, *arguments, "--updates", 10)
    assert stopped.code == 0, stopped.output
    finished = launch(ENGINES[engine].warm, 2, SCRIPT, *arguments, "--updates", 20)
    last, middle = weights_after(expected, 20), weights_after(expected, 10)
    assert_same_weights(weights_after(tmp_path, 20), last, started_from=middle)
    assert finished.code == 0, finished.output
    assert said.strip() in finished.output
