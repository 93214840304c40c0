"""A run saved by any engine on any number of ranks goes on in any other: all pairs with --full, else a part of them."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arsg_dist.engine import SingleProcessCommunicator
from tests.support import checkpoint_matrix as matrix
from tests.support.compare import assert_same_weights
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks

JOB = "tests/support/checkpoint_matrix_job.py"
EVERYBODY = [(family, ranks) for family, sizes in matrix.SIZES.items() for ranks in sizes]
TURNS = {  # in every run all engines save on all numbers of ranks, and all load on one
    ("deepspeed", 3): 0,
    ("horovod", 2): 1,
    ("horovod", 3): 1,
    ("deepspeed", 2): 2,
    ("torchrun", 3): 2,
}


def run(what: str, family: str, ranks: int, directory: Path) -> None:
    job = launch(matrix.LAUNCHERS[family], ranks, JOB, what, family, directory, timeout=400)
    assert job.code == 0, f"{what} {family} {ranks}: {job.output[-5000:]}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every engine on every number of ranks has saved."""
    directory = tmp_path_factory.mktemp("matrix")
    for family, ranks in EVERYBODY:
        run("save", family, ranks, directory)
    return directory


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[str, Tensor], list[float], dict[str, Tensor]]:
    """Weights at the end and losses of one process that never stopped, and the weights it started from."""
    engine = matrix.build_engine("single", SingleProcessCommunicator())
    start = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    losses = matrix.train(engine, 0, matrix.UPDATES)
    return dict(engine.module.state_dict()), losses, start


def assert_same_contents(path: Path, expected: Path) -> None:
    tensors, others = matrix.contents(path)
    expected_tensors, expected_others = matrix.contents(expected)
    assert tensors.keys() == expected_tensors.keys(), path
    for key, tensor in expected_tensors.items():
        assert tensors[key].dtype == tensor.dtype, f"{path}: {key}"
        assert torch.equal(tensors[key], tensor), f"{path}: {key}"
    assert others == expected_others, path


@pytest.mark.parametrize(
    ("family", "ranks"),
    [pytest.param(*who, marks=pytest.mark.turn(TURNS[who]) if who in TURNS else []) for who in EVERYBODY],
)
def test_every_engine_goes_on_from_everybodys_checkpoints(
    family: str,
    ranks: int,
    saved: Path,
    uninterrupted: tuple[dict[str, Tensor], list[float], dict[str, Tensor]],
    request: pytest.FixtureRequest,
) -> None:
    """Catches state lost, cut or assigned wrongly between any two engines and numbers of ranks: masters, m, v, v̂,
    steps, slow weights, settings of each group, frozen parameters, buffers, progress."""
    every = bool(request.config.getoption("--full"))
    run("load-all" if every else "load", family, ranks, saved)
    weights, expected_losses, start = uninterrupted
    for name in matrix.FAMILIES[family]:
        me = f"{name}-{ranks}"
        losses = json.loads((saved / f"losses {me}.json").read_text())
        for source, size in matrix.sources_for(name, ranks, every=every):
            pair = f"{source}-{size} {me}"
            again = saved / "again" / pair / "step-000000001"
            assert_same_contents(again, matrix.checkpoint(saved, source, size))
            end = matrix.whole_model(matrix.contents(saved / "end" / pair / "step-000000001")[0])
            assert torch.equal(end.pop(matrix.FROZEN), weights[matrix.FROZEN]), pair
            assert_same_weights(
                end,
                {key: tensor for key, tensor in weights.items() if key != matrix.FROZEN},
                started_from={key: tensor for key, tensor in start.items() if key != matrix.FROZEN},
            )
            for loss, expected in zip(
                losses[f"{source}-{size}"], expected_losses[matrix.SAVE_AFTER :], strict=True
            ):
                assert loss == pytest.approx(expected, rel=1e-6), pair


def test_half_precision_parameters_travel_with_their_masters(tmp_path: Path) -> None:
    """Catches masters that are rounded to bf16 on the way, and parameters that are not the rounded masters."""
    for family, ranks in (
        ("deepspeed", 2),
        ("horovod", 3),
        ("deepspeed", 1),
        ("horovod", 2),
        ("deepspeed", 3),
    ):
        run("half", family, ranks, tmp_path)
    chain = sorted((tmp_path / "chain").iterdir())
    assert len(chain) == 11
    rounded = 0
    for link, following in itertools.pairwise(chain):
        name = following.name.split("-", 1)[1].rsplit("-", 1)[0]
        source = link / "step-000000001"
        assert_same_contents(tmp_path / "again" / f"{link.name} {name}" / "step-000000001", source)
        for key, tensor in matrix.contents(source)[0].items():
            if key.startswith("parameter:") and matrix.FROZEN not in key:
                assert tensor.dtype == torch.float32
                rounded += int((tensor != tensor.bfloat16().float()).any())
    assert rounded > 0, "the masters are bf16 numbers, so the test would show nothing"
