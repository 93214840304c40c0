"""Cases that every engine trains, saves, resumes, and goes on with from another's checkpoint."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from arsg_dist.checkpoint import SavedRun
from arsg_dist.engine import Engine, SingleProcessCommunicator
from tests.support.checkpoint_matrix import LAUNCHERS, save
from tests.support.launchers import launch

SAVE_AFTER, UPDATES = 3, 6


class Cases(Protocol):
    """A module with cases, which the job and the test of its name go through."""

    CASES: Collection[str]
    __name__: str

    def engines_of(self, family: str, label: str) -> list[str]:
        """Those of a family that can train with a case."""

    def build(self, name: str, label: str, communicator: Any) -> Engine:
        """An engine of `FAMILIES` for a case."""

    def train(self, engine: Engine, first: int, last: int) -> Any:
        """Makes updates from `first` up to `last`."""

    def weights(self, engine: Engine) -> dict[str, Tensor]:
        """What is compared."""

    def seen(self, engine: Engine) -> dict[str, Any]:
        """What is noted besides when it is saved."""


def follow(
    cases: Cases, name: str, label: str, communicator: Any, directory: Path, source: Path | None
) -> dict[str, Any]:
    """What an engine makes of a case: at the end, resumed ("resumed"), and from another's checkpoint ("moved")."""
    torch.set_num_threads(1)  # on which the sums in a product depend
    engine = cases.build(name, label, communicator)
    cases.train(engine, 0, SAVE_AFTER)
    saved = save(engine, directory, {})
    found = cases.seen(engine)
    cases.train(engine, SAVE_AFTER, UPDATES)
    found["end"] = cases.weights(engine)
    for what, path in (("resumed", saved), ("moved", source)):
        if path is not None:
            found[what] = cases.weights(gone_on(cases, name, label, communicator, path))
    return found


def gone_on(cases: Cases, name: str, label: str, communicator: Any, path: Path) -> Engine:
    """A new engine that has trained to the end from a checkpoint."""
    engine = cases.build(name, label, communicator)
    engine.load_state(SavedRun(path))
    cases.train(engine, SAVE_AFTER, UPDATES)
    return engine


def alone(cases: Cases, directory: Path) -> dict[str, Any]:
    """What one process finds, label → as `follow`; its checkpoints are in the directory."""
    one = SingleProcessCommunicator()
    return {
        label: follow(cases, "single", label, one, directory / "single" / label, None)
        for label in cases.CASES
    }


def on_ranks(
    cases: Cases, family: str, ranks: int, directory: Path
) -> list[tuple[str, str, Path, dict[str, Any]]]:
    """Label, engine, its checkpoint and what it found, of each engine of a family for each case."""
    job = launch(
        LAUNCHERS[family],
        ranks,
        "tests/engines/jobs/followed_job.py",
        cases.__name__,
        family,
        directory,
        timeout=400,
    )
    assert job.code == 0, job.output[-5000:]
    all_found = []
    for label in cases.CASES:
        for name in cases.engines_of(family, label):
            where = directory / f"{name}-{ranks}" / label
            found = torch.load(where / "found.pt", weights_only=True)
            all_found.append((label, name, next(where.glob("step-*")), found))
    return all_found
