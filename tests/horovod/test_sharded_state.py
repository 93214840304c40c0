"""State of a sharded optimizer that is saved: for any engine, any number of ranks, and one that is not sharded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arsg_dist import ARSG
from arsg_dist.checkpoint import SavedRun
from arsg_dist.checkpoint.export import export_saved
from arsg_dist.engine.state import PARAMETER
from tests.horovod.jobs.state_files_job import share_of_batch
from tests.support import toy
from tests.support.compare import REDUCTION_ORDER, assert_same_weights
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

JOB = "tests/horovod/jobs/sharded_engine_job.py"
CHAIN = (
    ("sharded", "mpirun", 2),
    ("single", "warm alone", 1),
    ("sharded", "warm horovodrun", 3),
    ("horovod", "mpirun", 2),
    ("sharded", "warm alone", 1),
)


@pytest.mark.turn(1)
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


FILE_CHAIN = (("mpirun", 2), ("warm horovodrun", 3), ("warm alone", 1))


def one_process(dtype: torch.dtype, ranks_of_update: list[int]) -> dict[str, Tensor]:
    """The fp32 weights after these updates; gradients are those of the model in `dtype` on each rank's rows."""
    model, masters = toy.build_model().to(dtype), toy.build_model().to(dtype).float()
    optimizer = ARSG(masters.parameters(), **toy.HYPERPARAMETERS, foreach=False, fused=False)
    for update, ranks in enumerate(ranks_of_update):
        optimizer.zero_grad()
        for rank in range(ranks):
            model.zero_grad()
            share_of_batch(model, update, rank, ranks).backward()
            for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                gradient = parameter.grad.float() / ranks
                master.grad = gradient if master.grad is None else master.grad + gradient
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), model.parameters(), strict=True):
                parameter.copy_(master)
    return {name: master.detach() for name, master in masters.named_parameters()}


@pytest.mark.turn(0)
def test_a_file_goes_from_ranks_to_ranks_and_to_one_process(tmp_path: Path) -> None:
    """Catches state, or the masters of half precision, that are lost, cut or assigned wrongly on the way through a file
    to another number of ranks, and keys that a plain ARSG does not know."""
    for update, (launcher, ranks) in enumerate(FILE_CHAIN):
        job = launch(launcher, ranks, "tests/horovod/jobs/state_files_job.py", tmp_path, update)
        assert job.code == 0, f"{ranks} ranks: {job.output[-5000:]}"
    sizes = [ranks for _, ranks in FILE_CHAIN]

    half = torch.load(tmp_path / f"3-{torch.bfloat16}.pt", weights_only=True)
    names = list(half["model"])
    masters = {names[place]: master for place, master in half["optimizer"]["master_params"].items()}
    started_from = {
        name: tensor.float() for name, tensor in toy.build_model().bfloat16().state_dict().items()
    }
    assert_same_weights(masters, one_process(torch.bfloat16, sizes), started_from=started_from, relative=1e-3)
    assert all(torch.equal(half["model"][name], master.bfloat16()) for name, master in masters.items())

    full = torch.load(tmp_path / f"3-{torch.float32}.pt", weights_only=True)
    model = toy.build_model()
    started_from = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(full["model"])
    plain = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    plain.load_state_dict(full["optimizer"])
    share_of_batch(model, len(FILE_CHAIN), 0, 1).backward()
    plain.step()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected = one_process(torch.float32, [*sizes, 1])
    assert_same_weights(weights, expected, started_from=started_from, relative=REDUCTION_ORDER)
