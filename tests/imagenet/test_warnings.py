"""Warnings of libraries that a user can do nothing about."""

import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from arsg_dist.imagenet.cli import _future_warnings_once
from tests.support.engines import ENGINES, STAGES
from tests.support.warm_ranks import WarmRanks, warm_ranks


@pytest.fixture
def warm() -> WarmRanks:
    return warm_ranks()


@pytest.mark.parametrize(
    ("rank", "options", "shown"),
    [
        (0, [], ["first", "second", "other"]),
        (1, [], ["other"]),
        (1, ["default"], ["first"] * 3 + ["second", "other"]),
    ],
)
def test_future_warnings_are_shown_once_in_a_run(
    rank: int, options: list[str], shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches one of torch's in every update of every rank, which hide what the run says; other warnings that are
    swallowed with them; and `python -W` that is not obeyed."""
    monkeypatch.setattr(sys, "warnoptions", options)
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        with _future_warnings_once(rank):
            for text in ("first", "first", "first", "second"):
                with warnings.catch_warnings():  # as torch does: Python forgets what it has shown
                    warnings.warn(text, FutureWarning, stacklevel=1)
            warnings.warn("other", UserWarning, stacklevel=1)
        assert [str(warning.message) for warning in log] == shown


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        pytest.param("deepspeed-3", marks=pytest.mark.turn(0)),
        pytest.param("horovod-sharded", marks=pytest.mark.turn(1)),
        pytest.param("fsdp", marks=pytest.mark.turn(2)),
    ],
)
def test_a_run_of_two_ranks_shows_each_future_warning_once(
    engine: str, warm: WarmRanks, tmp_path: Path
) -> None:
    """Catches warnings of every rank, of what is imported before they meet, and of every loader process; and real ones
    of an engine's libraries."""
    settings = {
        **{"data.source": "synthetic", "data.synthetic_images": 24, "data.synthetic_classes": 3},
        **{"data.image_size": 8, "data.workers": 2, "model": "resnet20", "batch_size": 12, "epochs": 2},
        **{"optimizer.params": "{lr: 0.01}", "output": tmp_path / "run"},
    }
    started = (ENGINES | STAGES)[engine]
    job = warm.run_program(
        started.launcher,
        "tests/imagenet/jobs/warnings_job.py",
        *started.options,
        *(text for name, value in settings.items() for text in (f"--{name}", value)),
        environment={**os.environ},
        ranks=2,
        end_together=True,
    )
    assert job.codes == [0, 0], job.output[-6000:]
    shown = Counter(re.findall(r"FutureWarning: (.+)", job.output))
    assert shown["FutureWarning in each update"] == shown["FutureWarning while it connects"] == 1
    assert set(shown.values()) == {1}, shown
    assert "FutureWarning" not in job.outputs[1]
