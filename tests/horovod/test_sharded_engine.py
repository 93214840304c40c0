"""The sharded engine: its checkpoints are everybody's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arsg_dist.checkpoint import SavedRun
from arsg_dist.checkpoint.export import export_saved
from arsg_dist.engine.state import PARAMETER
from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

JOB = "tests/horovod/jobs/sharded_engine_job.py"
CHAIN = (
    ("sharded", "mpirun", 2),
    ("single", "alone", 1),
    ("sharded", "horovodrun", 3),
    ("horovod", "mpirun", 2),
    ("sharded", "alone", 1),
)


def test_a_run_goes_on_from_engine_to_engine_as_if_never_interrupted(tmp_path: Path) -> None:
    """Catches state that is lost, cut or assigned wrongly when saved from, or loaded into, any number of shards."""
    for update, (engine, launcher, ranks) in enumerate(CHAIN):
        job = launch(launcher, ranks, JOB, engine, tmp_path, update, update + 1)
        assert job.code == 0, f"{engine} on {ranks} ranks: {job.output[-5000:]}"
    start = {name: parameter.detach() for name, parameter in toy.build_model().named_parameters()}
    runs = [SavedRun(tmp_path / str(update) / f"step-{update:09d}") for update in range(1, len(CHAIN) + 1)]
    expected = toy.single_process_weights(len(CHAIN), clip_grad_norm=0.5)
    assert_same_weights(
        {name: runs[-1].whole(PARAMETER, name) for name in runs[-1].parameters}, expected, started_from=start
    )
    for update, run in enumerate(runs, start=1):
        assert run.manifest.tensors.keys() == runs[1].manifest.tensors.keys()  # written by one process
        moved = torch.load(tmp_path / str(update) / "base_iterate.pt", weights_only=True)
        export_saved(run, tmp_path / "theta.safetensors", at="theta")
        for name, theta in load_file(tmp_path / "theta.safetensors").items():
            assert torch.allclose(theta, moved[name])
