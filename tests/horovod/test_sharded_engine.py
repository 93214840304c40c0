"""The sharded engine: its checkpoints are everybody's."""

from pathlib import Path

import pytest
import torch

from arsg_dist import ARSG
from arsg_dist.optim.base_iterate import base_iterate_point
from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

JOB = "tests/support/horovod_sharded_engine_job.py"
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
    files = [
        torch.load(tmp_path / str(update) / "replicated.pt", weights_only=True)
        for update in range(1, len(CHAIN) + 1)
    ]
    expected = toy.single_process_weights(len(CHAIN), clip_grad_norm=0.5)
    assert_same_weights(files[-1]["model"], expected, started_from=start)
    for file, update in zip(files, range(1, len(CHAIN) + 1), strict=True):
        assert file.keys() == files[1].keys()  # the second was written by one process
        assert file["optimizer"].keys() == {"state", "param_groups"}
        for index, state in file["optimizer"]["state"].items():
            assert state.keys() == files[1]["optimizer"]["state"][index].keys()
            assert state["exp_avg"].untyped_storage().nbytes() == state["exp_avg"].nbytes
        for name, tensor in file["model"].items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} is stored with others' memory"
        plain = ARSG(parameters := [tensor.clone() for tensor in file["model"].values()])
        plain.load_state_dict(file["optimizer"])
        moved = torch.load(tmp_path / str(update) / "base_iterate.pt", weights_only=True)
        for tensor, theta in zip(parameters, moved.values(), strict=True):
            assert torch.allclose(
                base_iterate_point(tensor, plain.state[tensor], plain.param_groups[0]), theta
            )
