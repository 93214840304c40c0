"""State in bfloat16 and in 8 bits, and split masters: on every engine, over ranks, from and into checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from arsg_dist.engine import SingleProcessCommunicator
from tests.engines import few_bits, followed
from tests.support import toy
from tests.support.compare import assert_same_weights

pytestmark = pytest.mark.ranks

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory with what one process has saved, and what it found."""
    directory = tmp_path_factory.mktemp("few bits")
    return directory, followed.alone(few_bits, directory)


@pytest.mark.parametrize(
    "family",
    [
        "torchrun",
        pytest.param("deepspeed", marks=pytest.mark.turn(0)),
        pytest.param("horovod", marks=pytest.mark.turn(1)),
    ],
)
def test_two_ranks(family: str, alone: tuple[Path, dict[str, Any]]) -> None:
    """Catches random bits that depend on where ranks cut, moments kept in float32 on the quiet, codes saved for values,
    a correction lost on the way, and a resumed run that rounds again.

    With equal gradients everywhere: bfloat16 state and split masters give the bits of one process. Blocks of 8 bits are
    those of a rank's part, so the weights are only near; from a checkpoint of the same ranks on they are the same.
    """
    directory, expected = alone
    start = {name: p.detach().clone() for name, p in toy.build_model(*few_bits.SIZES).named_parameters()}
    for label, name, saved, found in followed.on_ranks(few_bits, family, 2, directory):
        exact = "8bit" not in label
        assert (found["moments"] > 0) == (not exact), f"{label} on {name}"
        engine = followed.gone_on(few_bits, "single", label, SingleProcessCommunicator(), saved)
        one = expected[label]
        for what, actual, right, same in (
            ("saved", found["saved"], one["saved"], exact),
            ("end", found["end"], one["end"], exact),
            ("resumed", found["resumed"], found["end"], True),
            ("gone on from one process's", found["moved"], one["end"], exact),
            ("gone on in one process", few_bits.weights(engine), one["end"], exact),
        ):
            if same:
                differing = [key for key in right if not torch.equal(actual[key], right[key])]
                assert not differing, f"{label} on {name}, {what}: {differing}"
            else:
                try:
                    near(actual, right, start)
                except AssertionError as error:
                    raise AssertionError(f"{label} on {name}, {what}: {error}") from None


def near(actual: Weights, right: Weights, start: Weights) -> None:
    floats = [{key: tensor.float() for key, tensor in weights.items()} for weights in (actual, right)]
    assert_same_weights(*floats, started_from=start, relative=0.15)
