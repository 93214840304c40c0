"""Each engine trains, saves, resumes and evaluates with each optimizer as one process does."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from arsg_dist.checkpoint import SavedRun
from arsg_dist.checkpoint.export import export_saved
from arsg_dist.engine import SingleProcessCommunicator
from tests.engines import followed
from tests.engines import optimizer_cases as optimizers
from tests.engines.optimizer_cases import CASES
from tests.support.compare import assert_same_weights

pytestmark = pytest.mark.ranks

THETA = 1e-3
JOBS = [
    ("torchrun", 2),
    ("horovod", 3),
    ("deepspeed", 2),
    pytest.param("torchrun", 3, marks=pytest.mark.turn(0)),
    pytest.param("horovod", 2, marks=pytest.mark.turn(1)),
    pytest.param("deepspeed", 3, marks=pytest.mark.turn(2)),
    pytest.param("deepspeed", 1, marks=pytest.mark.turn(0)),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory with what one process has saved, and what it found."""
    directory = tmp_path_factory.mktemp("optimizers")
    return directory, followed.alone(optimizers, directory)


@pytest.mark.parametrize(("family", "ranks"), JOBS)
def test_ranks_equal_one_process_and_go_on_from_each_others_checkpoints(
    family: str, ranks: int, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Catches an average movement, a moment or a setting that is cut, lost or left at its default on the way through
    an engine or a checkpoint, an inner optimizer that updates something else than the engine's shards, and a θ of
    another group's μ."""
    directory, expected = alone
    for label, name, path, found in followed.on_ranks(optimizers, family, ranks, directory):
        case = CASES[label]
        export_saved(SavedRun(path), tmp_path / "theta.safetensors", at="theta")
        exported = load_file(tmp_path / "theta.safetensors")
        engine = followed.gone_on(optimizers, "single", label, SingleProcessCommunicator(), path)
        # θ has moved little, by differences of numbers as large as the movement of x: their roundings remain. Over
        # three ranks Horovod adds up in an order of the moment, and DistributedDataParallel forms its buckets anew
        # after its first pass.
        of_theta = max(case.relative, THETA)
        again = case.relative if ranks == 3 and name in ("ddp", "horovod") else 0.0
        for what, actual, right, relative in (
            ("end", found["end"], expected[label]["end"], case.relative),
            ("resumed", found["resumed"], found["end"], again),
            ("gone on from one process's", found["moved"], expected[label]["end"], case.relative),
            (
                "gone on in one process",
                optimizers.weights(engine),
                expected[label]["end"],
                case.relative,
            ),
            ("θ", found["theta"], expected[label]["theta"], of_theta),
            ("exported θ", {key: exported[key] for key in found["theta"]}, found["theta"], THETA),
        ):
            try:
                assert_same_weights(
                    actual, right, started_from=optimizers.started_from(label), relative=relative
                )
            except AssertionError as error:
                raise AssertionError(f"{label} on {name}, {what}: {error}") from None
