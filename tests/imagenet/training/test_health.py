"""The watch over a run, asked directly: what it counts, keeps and says."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from arsg_dist.engine import JobError, SingleProcessCommunicator
from arsg_dist.imagenet.config import TrainConfig
from arsg_dist.imagenet.training.health import HealthMonitor, RankReport


def watched(**settings: Any) -> tuple[Any, HealthMonitor]:
    engine = SimpleNamespace(
        device=torch.device("cpu"),
        skipped_updates=0,
        loss_scaling=False,
        module=nn.BatchNorm1d(1),
        communicator=SingleProcessCommunicator(),
    )
    engine.local_parameters = engine.module.parameters
    return engine, HealthMonitor(TrainConfig(**settings), engine)


def test_only_skipped_updates_one_after_another_end_a_run() -> None:
    """Catches a count that good updates do not reset, and a limit that is one too low or high."""
    engine, watch = watched(on_nonfinite="skip", max_skipped_updates=2)
    update = 0
    for skipped in (1, 1, 0, 1, 1, 0):
        update += 1
        watch.before_update(update)
        engine.skipped_updates += skipped
        watch.after_update(update)
    for last in (False, False, True):
        update += 1
        watch.before_update(update)
        engine.skipped_updates += 1
        if last:
            with pytest.raises(JobError, match="of 3 updates one after another, the last of them 9, are not"):
                watch.after_update(update)
        else:
            watch.after_update(update)


def test_statistics_of_a_skipped_update_are_those_of_before() -> None:
    """Catches running statistics that the images of a skipped update stay in, and those of good updates thrown away."""
    engine, watch = watched(on_nonfinite="skip")
    mean = engine.module.running_mean
    for update, (value, skipped) in enumerate([(1.0, 0), (float("nan"), 1), (2.0, 0)], 1):
        watch.before_update(update)
        mean.fill_(value)
        engine.skipped_updates += skipped
        watch.after_update(update)
        assert mean.item() == (1.0 if skipped else value)


def test_the_first_bad_loss_is_reported_once() -> None:
    """Catches the last bad loss reported, one that is reported again, and NaN in the sum of losses."""
    _, watch = watched()
    losses = [
        watch.finite(torch.tensor(value), update)
        for update, value in ((3, 1.0), (4, torch.nan), (6, torch.inf))
    ]
    assert [float(loss) for loss in losses] == [1.0, 0.0, 0.0]
    assert watch.report().first_nonfinite == 4
    assert watch.report().first_nonfinite is None


def test_the_ranks_of_the_first_bad_loss_are_named() -> None:
    """Catches the rank blamed that had its bad loss later, as a consequence."""
    reports = [
        RankReport("a", 0.0, 7),
        RankReport("b", 0.0, 5),
        RankReport("c", 0.0, None),
        RankReport("d", 0.0, 5),
    ]
    _, watch = watched()
    with pytest.raises(JobError, match=r"the loss of update 5 is not finite on rank 1 \(b\), 3 \(d\);"):
        watch.judge(reports)
    _, watch = watched(on_nonfinite="skip")
    assert watch.judge(reports)[0].endswith("on rank 1 (b), 3 (d); its gradient was left out")


def test_a_slow_rank_is_named_once_and_again_when_it_is_slow_anew() -> None:
    """Catches a rank compared with a median it is part of, a warning at every record, and only one for a whole run."""

    def said(seconds: list[float]) -> list[str]:
        return [
            note.partition(" is ")[0] for note in watch.judge([RankReport("h", s, None) for s in seconds])
        ]

    _, watch = watched()
    assert said([1.0, 2.5]) == ["warning: rank 1 on h"]  # 2.5 is more than twice 1.0
    assert said([1.0, 2.5]) == []
    assert said([1.0, 1.9]) == ["rank 1 on h"]
    assert said([1.0, 2.1]) == ["warning: rank 1 on h"]
    _, watch = watched()
    assert said([0.01, 0.2]) == []  # less than a noticeable time
    assert watch.judge([RankReport("h", 9.0, None)]) == []


def test_a_single_infinite_weight_keeps_a_checkpoint_from_being_written() -> None:
    """Catches a look at the first parameter, or at the parameters' sum."""
    engine, watch = watched()
    watch.require_finite_weights()
    with torch.no_grad():
        engine.module.bias.fill_(-torch.inf)
    with pytest.raises(JobError, match="weights are not finite; no checkpoint was written"):
        watch.require_finite_weights()
