"""Pairs of a signal, whom it reaches, loader processes and the moment: the run saves, and goes on with the same bits.

The same as `tests/faults/campaign.py` at chosen moments. Each line is one start of a run, which goes on where the one
before was stopped.
"""

import random
from pathlib import Path

import pytest

from tests.faults.campaign import RANKS, Strike, StruckRun, run
from tests.support.warm_ranks import WarmRanks

pytestmark = pytest.mark.ranks

# Any two values of two columns are together in some line.
STOPS = [
    ("SIGTERM", "process group", 2, "data workers start"),
    ("SIGINT", "one rank", 0, "checkpoint written"),
    ("SIGUSR1", "process group", 0, "training step"),
    ("SIGTERM", "one rank", 0, "validation"),
    ("SIGINT", "process group", 2, "validation"),
    ("SIGUSR1", "one rank", 2, "checkpoint written"),
    ("SIGINT", "one rank", 2, "training step"),
    ("SIGUSR1", "one rank", 0, "data workers start"),
    ("SIGTERM", "process group", 2, "checkpoint written"),
    ("SIGTERM", "process group", 2, "training step"),
    ("SIGUSR1", "process group", 0, "validation"),
    ("SIGINT", "process group", 0, "data workers start"),
]
EARLY = {
    "reduce": 1,
    "sync": 12,
}  # passes of a point, where it is not the first: soon, so that the run is not over


@pytest.mark.parametrize(
    ("engine", "stops"),
    [
        pytest.param("single", STOPS[:6], id="single", marks=pytest.mark.turn(2)),
        pytest.param("single", STOPS[6:], id="single, others", marks=pytest.mark.turn(0)),
        pytest.param("ddp", STOPS[:6], id="ddp", marks=pytest.mark.turn(1)),
        pytest.param("horovod-sharded", STOPS[6:], id="horovod-sharded", marks=pytest.mark.turn(2)),
    ],
)
def test_a_stop_saves_and_loses_nothing(
    engine: str, stops: list[tuple[str, str, int, str]], warm: WarmRanks, tmp_path: Path
) -> None:
    """Catches loader processes that die of a signal to the process group before their rank has saved, as they did of
    Ctrl-C and SIGTERM; a stop in a validation or while a checkpoint is written that is lost, or saves half; another
    exit code than 75; records that a resume keeps twice; processes and semaphores that are left."""
    assert set(run(warm, engine, "--output", tmp_path / "whole", "--data.workers", 0).codes) == {0}
    chance = random.Random(0)
    struck = StruckRun(warm, engine, tmp_path / "run")
    for signal, to, workers, moment in stops:
        strike = Strike.at_moment(chance, signal, to, workers, moment, RANKS[engine])
        strike = Strike(**{**vars(strike), "at": EARLY.get(strike.point, 1)})
        result = struck.strike(strike)
        assert result["struck"], strike
        assert not result["done"], strike
    struck.finish(tmp_path / "whole")
    assert struck.lost == [0] * len(stops)
