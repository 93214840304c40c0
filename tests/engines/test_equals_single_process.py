"""Real ranks end with the weights one process gets from the whole batch."""

from pathlib import Path

import pytest
import torch

from tests.support import toy
from tests.support.compare import assert_same_weights
from tests.support.engines import ENGINES, ON_RANKS
from tests.support.launchers import launch

pytestmark = pytest.mark.ranks


NAMED = ("deepspeed", "ddp", "fsdp", "horovod")


def started_from() -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in toy.build_model().named_parameters()}


@pytest.mark.parametrize(
    ("engine", "launcher", "ranks", "accumulation_steps", "clip_grad_norm"),
    [
        pytest.param("deepspeed", "deepspeed", 2, 1, 0.0, marks=pytest.mark.turn(1)),
        ("deepspeed", "warm deepspeed", 3, 2, 0.0),
        ("deepspeed", "warm deepspeed", 2, 2, 0.5),
        pytest.param("ddp", "torchrun", 2, 2, 0.5, marks=pytest.mark.turn(2)),
        ("ddp", "warm torchrun", 1, 3, 0.0),
        ("ddp", "warm torchrun", 3, 2, 0.0),
        pytest.param("ddp", "warm torchrun", 4, 1, 0.5, marks=pytest.mark.turn(1)),
        pytest.param("fsdp", "torchrun", 2, 2, 0.5, marks=pytest.mark.turn(0)),
        ("fsdp", "warm torchrun", 1, 3, 0.0),
        ("fsdp", "warm torchrun", 3, 2, 0.0),
        pytest.param("fsdp", "warm torchrun", 4, 1, 0.5, marks=pytest.mark.turn(2)),
        pytest.param("horovod", "mpirun", 2, 1, 0.0, marks=pytest.mark.turn(2)),
        pytest.param("horovod", "mpirun", 3, 2, 0.5, marks=pytest.mark.turn(0)),
        pytest.param("horovod", "horovodrun", 2, 2, 0.0, marks=pytest.mark.turn(1)),
        ("horovod", "warm horovodrun", 3, 1, 0.0),
        *(
            (name, ENGINES[name].warm, 2, 2, 0.5)
            for name in ON_RANKS
            if name not in (*NAMED, "horovod-sharded")
        ),
    ],
)
def test_engine_gives_the_weights_of_one_process(
    engine: str, launcher: str, ranks: int, accumulation_steps: int, clip_grad_norm: float, tmp_path: Path
) -> None:
    """Catches gradients summed instead of averaged, scaled by the accumulation, clipped per rank or by default."""
    output = tmp_path / "weights.pt"
    job = launch(
        launcher, ranks, "tests/support/engine_job.py", engine, output, accumulation_steps, clip_grad_norm
    )
    assert job.code == 0, job.output[-5000:]
    assert_same_weights(
        torch.load(output, weights_only=True),
        toy.single_process_weights(clip_grad_norm=clip_grad_norm),
        started_from=started_from(),
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_plain_deepspeed_json_trains_arsg_under_every_zero_stage(ranks: int, tmp_path: Path) -> None:
    """Catches a stage that does not accept the type ARSG, or that counts or shards its state wrongly."""
    job = launch("warm deepspeed", ranks, "tests/deepspeed/jobs/plain.py", tmp_path)
    assert job.code == 0, job.output[-5000:]
    for stage in range(4):
        assert_same_weights(
            torch.load(tmp_path / f"zero{stage}.pt", weights_only=True),
            toy.single_process_weights(),
            started_from=started_from(),
        )


def test_the_comparison_sees_a_small_error() -> None:
    """Catches a comparison that passes anything: one weight off by 0.1 % of its tensor's movement."""
    start, expected = started_from(), toy.single_process_weights()
    wrong = {name: weight.clone() for name, weight in expected.items()}
    wrong["2.weight"][5, 7] += 1e-3 * (expected["2.weight"] - start["2.weight"]).abs().max()
    with pytest.raises(AssertionError, match=r"2\.weight"):
        assert_same_weights(wrong, expected, started_from=start)
