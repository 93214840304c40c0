"""Checkpoints damaged between two starts: named on every rank, and the previous good one is used when asked."""

import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from arsg_dist.checkpoint import SavedRun
from tests.faults.test_fuzz import damage
from tests.faults.test_kills import SETTINGS, uninterrupted, weights
from tests.faults.test_silent_faults import assert_refused, checkpoints
from tests.support.warm_ranks import WarmRanks

DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-100]),
    "one bit flipped": lambda path, other: _flip(path),
    "missing": lambda path, other: path.unlink(),
    "of another checkpoint": lambda path, other: shutil.copy(other, path),
}
SAID = {
    "truncated": "is damaged: it has ",
    "one bit flipped": "is damaged, or of another checkpoint: the digest of ",
    "missing": "is missing",
    "of another checkpoint": "is damaged, or of another checkpoint: ",
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-77] ^= 4
    path.write_bytes(content)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("horovod-sharded", marks=pytest.mark.turn(2)),
        pytest.param("deepspeed", marks=pytest.mark.turn(0)),
    ],
)
def test_damaged_shards(engine: str, warm: WarmRanks, recipe: list[str], tmp_path: Path) -> None:
    """Catches values of a broken disk, or of another update, that are trained on; ranks of which one goes on."""
    expected = uninterrupted(warm, engine, recipe, tmp_path)
    run = tmp_path / "run"
    arguments = [*recipe, *SETTINGS]
    assert warm.run(engine, *arguments, "--max_updates", "9").codes == [0, 0]
    assert checkpoints(run)[-2:] == [6, 8]
    older, newest = (run / "checkpoints" / f"step-{number:09d}" for number in (6, 8))
    good = tmp_path / "good"
    shutil.copytree(newest, good)
    for name, break_it in DAMAGES.items():
        shard = newest / "shard-00001.safetensors"
        break_it(shard, older / shard.name)
        job = warm.run(engine, *arguments, "--resume")
        assert_refused(job, "--skip_damaged goes on from the newest checkpoint that is not damaged")
        assert f"{shard} {SAID[name]}" in job.output, (name, job.output[-3000:])
        shutil.rmtree(newest)
        shutil.copytree(good, newest)
    _flip(shard)
    job = warm.run(engine, *arguments, "--resume", "--skip_damaged")
    assert job.codes == [0, 0], job.output[-6000:]
    assert f"skipped {newest}" in job.output
    assert ": 6 updates" in job.output
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, expected[name]), name


def read_damaged(checkpoint: Path, directory: Path, rounds: int) -> None:
    """Only ValueErrors, and nothing read that differs from what was written."""
    whole = SavedRun(checkpoint)
    for number in range(rounds):
        chance = random.Random(number)
        copy = directory / f"damaged-{number}"
        shutil.copytree(checkpoint, copy)
        damaged = chance.choice([path for path in sorted(copy.iterdir()) if path.name != "score.json"])
        damage(damaged, chance)
        changed = damaged.read_bytes() != (checkpoint / damaged.name).read_bytes()
        with suppress(ValueError):
            assert SavedRun(copy).damage() or not changed or _same(SavedRun(copy), whole), (number, damaged)
        shutil.rmtree(copy)


def _same(one: SavedRun, other: SavedRun) -> bool:
    """Bytes that mean nothing, as white space in JSON, may change."""
    return one.manifest == other.manifest


@pytest.fixture
def checkpoint(recipe: list[str], tmp_path: Path) -> Path:
    from arsg_dist.imagenet.cli import train_command

    assert train_command([*recipe, "--epochs", "1"]) == 0
    return max((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_random_damage(checkpoint: Path, tmp_path: Path) -> None:
    """Catches a loader that ends in a traceback of json, numpy or safetensors, or overlooks damage."""
    read_damaged(checkpoint, tmp_path, 40)


@pytest.mark.turn(1)
def test_much_random_damage(checkpoint: Path, tmp_path: Path) -> None:
    """Catches the same in ten times as many damages: a traceback, or damage that is overlooked."""
    read_damaged(checkpoint, tmp_path, 400)
