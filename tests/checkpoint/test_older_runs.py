"""Runs that an older revision began go on to the weights that it would have had."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from arsg_dist.checkpoint import SavedRun
from arsg_dist.engine.state import BUFFER, PARAMETER
from tests.support.compare import assert_same_weights
from tests.support.engines import ENGINES
from tests.support.launchers import REPOSITORY, launch

FIXTURE = REPOSITORY / "tests/fixtures/runs_of_e96f4f8"
SETTINGS = [
    *("--config", "configs/digits.yaml", "--model", "resnet20", "--epochs", "2", "--batch_size", "360"),
    *("--checkpoint_every", "2", "--seed", "7"),
    *("--optimizer.params", "{lr: 0.02, eps: 1.0e-3, weight_decay: 1.0e-2, mu: 0.1}"),
]


@pytest.mark.parametrize(
    ("saved_by", "engine"),
    [
        *((name, name) for name in ("single", "horovod-sharded")),
        pytest.param("deepspeed", "deepspeed", marks=pytest.mark.turn(2)),
        pytest.param("horovod", "horovod", marks=pytest.mark.turn(0)),
        pytest.param("horovod", "horovod-sharded", marks=pytest.mark.turn(1)),
        pytest.param("horovod-sharded", "deepspeed", marks=pytest.mark.turn(2)),
        pytest.param("deepspeed", "ddp", marks=pytest.mark.turn(1)),
    ],
)
def test_a_run_of_an_older_revision_goes_on(saved_by: str, engine: str, tmp_path: Path) -> None:
    """Catches a key, a rule or a meaning of the checkpoint format that changed without a reader of the old."""
    run = tmp_path / "run"
    shutil.copytree(FIXTURE / saved_by / "run", run)
    started = ENGINES[engine]
    saved = SavedRun(run / "checkpoints" / "step-000000002")
    begun = {name: saved.whole(PARAMETER, name) for name in saved.parameters}
    begun |= {name: saved.whole(BUFFER, name) for name in saved.buffers}
    average = ["--ema_decay", "0.9"] if saved_by == "single" else []
    finished = launch(
        *(started.warm, started.ranks, FIXTURE / "job.py", *started.options, *SETTINGS, *average),
        *("--resume", "--output", run),
        timeout=240,
    )
    assert finished.code == 0, finished.output
    assert_same_weights(
        load_file(run / "weights" / "last.safetensors"),
        load_file(FIXTURE / saved_by / "expected.safetensors"),
        started_from=begun,
    )
