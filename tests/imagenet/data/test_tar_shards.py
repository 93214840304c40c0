"""Tar shards: what `arsg-imagenet shard` writes, refuses and reports, and how it is read."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data import shard_writer
from arsg_dist.imagenet.data.dataset import loader, open_splits
from arsg_dist.imagenet.data.folder import ImageTree
from arsg_dist.imagenet.data.sampler import SampleKey, TrainingSampler
from arsg_dist.imagenet.data.shard_writer import (
    Shard,
    _describe,
    _plan,
    shard,
    shard_command,
    write_shard,
)
from arsg_dist.imagenet.data.tar_shards import TarShards


@pytest.fixture
def shards(small_tree: Path, tmp_path: Path) -> Path:
    """The small tree in shards of at most 8 KiB: several per split."""
    destination = tmp_path / "shards"
    code = shard(
        small_tree, destination, splits=["train", "val"], workers=2, shard_bytes=8192, skip_bad=False
    )
    assert code == 0
    return destination


def contents(source: ImageTree | TarShards) -> list[tuple[bytes, int]]:
    return sorted(source.read(index) for index in range(len(source)))


def test_shards_hold_every_image_once_with_its_label(shards: Path, small_tree: Path) -> None:
    """Catches images lost at the border of shards, wrong offsets, and labels of another numbering."""
    assert len(list((shards / "train").glob("*.tar"))) > 2
    for split, images in (("train", 60), ("val", 21)):
        source, tree = TarShards(shards / split), ImageTree(small_tree / split)
        assert len(source) == images
        assert source.classes == tree.classes == ["0", "3", "6"]
        assert contents(source) == contents(tree)
    original = TarShards(shards / "train").name(5).split(" ")[0]
    assert (small_tree / "train" / original).read_bytes() == TarShards(shards / "train").read(5)[0]
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=shards / "train", check=True)


def test_other_webdataset_readers_can_read_them(shards: Path) -> None:
    """Catches member names or label files that WebDataset does not pair."""
    webdataset = pytest.importorskip("webdataset")
    paths = sorted(map(str, (shards / "train").glob("*.tar")))
    read = webdataset.WebDataset(paths, shardshuffle=False)
    assert sorted((sample["jpg"], int(sample["cls"])) for sample in read) == contents(
        TarShards(shards / "train")
    )


def test_shards_can_be_read_in_any_order_by_worker_processes(shards: Path) -> None:
    """Catches file positions shared between workers, and a source that cannot be sent to them."""
    config = DataConfig(source="shards", root="-", augmentation="none", image_size=16)
    train, _ = open_splits(shards, config, seed=1)
    order = TrainingSampler(60, epochs=1, batch_size=12, accumulation_steps=1, rank=0, world_size=1, seed=5)
    first = train[SampleKey(0, 3)]
    assert isinstance(first, tuple)
    again = pickle.loads(pickle.dumps(train))[SampleKey(0, 3)]
    assert torch.equal(again[0], first[0])
    here = list(loader(train, order, workers=0, image_size=16, pin_memory=False))
    there = loader(train, order, workers=2, image_size=16, pin_memory=False)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_damaged_copies_are_named_at_the_start(shards: Path) -> None:
    """Catches a training that finds out in its third hour that a shard was not copied to the end."""
    first, second = sorted((shards / "train").glob("*.tar"))[:2]
    os.truncate(first, first.stat().st_size - 1000)
    with pytest.raises(ValueError, match=rf"1 of \d+ shards .* {first.name} has \d+ bytes instead of"):
        TarShards(shards / "train")
    second.unlink()
    first.unlink()
    with pytest.raises(ValueError, match=rf"2 of \d+ shards .* {first.name} is missing"):
        TarShards(shards / "train")
    index = shards / "val" / "index.npy"
    index.write_bytes(index.read_bytes()[:-3] + b"abc")
    with pytest.raises(ValueError, match=r"index\.npy does not belong"):
        TarShards(shards / "val")


def test_the_wrong_source_is_named(shards: Path, small_tree: Path) -> None:
    """Catches a user sent away with torchvision's words when only data.source is wrong."""
    with pytest.raises(ValueError, match=r"set data\.source to shards"):
        ImageTree(shards / "train")
    with pytest.raises(ValueError, match=r"set data\.source to folder"):
        TarShards(small_tree / "train")


def test_bad_images_stop_the_sharding_or_are_left_out_and_listed(
    small_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches broken images packed for ever, and good ones lost without a word."""
    broken = sorted((small_tree / "train" / "3").iterdir())[4]
    broken.write_bytes(broken.read_bytes()[:150])
    destination = tmp_path / "shards"
    arguments = [str(small_tree), str(destination), "--workers", "1"]
    assert shard_command(arguments) == 3
    assert not destination.exists()
    assert str(broken) in (tmp_path / "shards.bad_images.txt").read_text()
    assert "1 images cannot be decoded" in capsys.readouterr().err
    assert shard_command([*arguments, "--on-bad-image", "skip"]) == 0
    assert "1 left out" in capsys.readouterr().out
    assert str(broken) in (destination / "bad_images.txt").read_text()
    assert len(TarShards(destination / "train")) == 59
    assert not list(tmp_path.glob(".*.partial"))


def test_a_directory_that_holds_something_is_left_alone(
    small_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches shards written over others, and two runs that write into one directory."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").touch()
    assert shard_command([str(small_tree), str(taken)]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert shard_command([str(small_tree), str(tmp_path / "other"), "--splits", "test"]) == 2
    assert "test does not exist" in capsys.readouterr().err

    def another_run_is_first(path: Path, content: bytes) -> None:
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / "thesis.tex").touch()
        write(path, content)

    write = shard_writer._write
    monkeypatch.setattr(shard_writer, "_write", another_run_is_first)
    assert shard_command([str(small_tree), str(tmp_path / "new"), "--workers", "1"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "small", "taken"]


def test_a_full_disk_leaves_nothing(
    small_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches half a data set under the name of a whole one."""

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("arsg_dist.imagenet.data.shard_writer._write", full)
    assert shard_command([str(small_tree), str(tmp_path / "shards"), "--workers", "1"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "shards" in path.name] == []
    shutil.rmtree(small_tree)


def test_a_shard_without_a_good_image_leaves_the_others_in_their_places(
    small_tree: Path, tmp_path: Path
) -> None:
    """Catches an index that counts a shard which was not written: its images would be read from the next one."""
    tree = ImageTree(small_tree / "train")
    shards = [write_shard(shard) for shard in _plan(tree, tmp_path, 2048, DataConfig())]
    assert len(shards) > 3
    bad = shards[1]
    bad.bad, bad.records = [f"{path}: bad" for _, path, _ in bad.images], []
    _describe(tree, small_tree / "train", tmp_path, shards)
    source = TarShards(tmp_path)
    assert not bad.path.exists()
    left_out = {number for number, _, _ in bad.images}
    expected = [
        (Path(path).read_bytes(), label)
        for shard in shards
        for number, path, label in shard.images
        if number not in left_out
    ]
    assert [source.read(index) for index in range(len(source))] == expected
    originals = [source.name(index).split(" ")[0] for index in range(len(source))]
    assert [(small_tree / "train" / name).read_bytes() for name in originals] == [
        image for image, _ in expected
    ]


def test_an_index_that_leads_anywhere_else_is_refused(small_tree: Path, tmp_path: Path) -> None:
    """Catches a border of the index that is one off: bytes of another image, or a label without a class."""
    tree = ImageTree(small_tree / "val")
    shards = [write_shard(shard) for shard in _plan(tree, tmp_path, 4096, DataConfig())]
    _describe(tree, small_tree / "val", tmp_path, shards)
    good = np.load(tmp_path / "index.npy")
    last = good[-1]
    end = shards[int(last["shard"])].size

    def refused(name: str, value: int) -> bool:
        changed = good.copy()
        changed[name][-1] = value
        np.save(tmp_path / "index.npy", changed)
        description = json.loads((tmp_path / "split.json").read_text())
        description["index_sha256"] = hashlib.sha256((tmp_path / "index.npy").read_bytes()).hexdigest()
        (tmp_path / "split.json").write_text(json.dumps(description))
        try:
            TarShards(tmp_path)
        except ValueError as error:
            return "index.npy leads outside" in str(error)
        return False

    fits = int(end - last["size"])
    assert [refused("offset", value) for value in (fits, fits + 1, -1)] == [False, True, True]
    assert [refused("size", value) for value in (int(end - last["offset"]) + 1, 2**62, -1)] == [True] * 3
    assert [refused("label", value) for value in (2, 3, -1)] == [False, True, True]
    assert [refused("shard", value) for value in (len(shards), -1)] == [True, True]


def out_of_memory(shard: Shard) -> Shard:
    if shard.path.name.endswith("000001.tar"):
        os.kill(os.getpid(), signal.SIGKILL)
    return write_shard(shard)


def without_memory(shard: Shard) -> Shard:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer, "decode", lambda *_, **__: bytearray(2**62))
        return write_shard(shard)


@pytest.mark.parametrize(
    ("work", "message"),
    [(out_of_memory, "a worker process has ended"), (without_memory, "no memory left to decode .*/train/")],
)
def test_workers_without_memory_are_said(
    work: Callable[[Shard], Shard],
    message: str,
    small_tree: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a traceback of the pool, images called bad for want of memory, and half a destination."""
    monkeypatch.setattr(shard_writer, "write_shard", work)
    monkeypatch.setattr(shard_writer, "_plan", partial(_plan_of, shard_writer._plan))
    assert shard_command([str(small_tree), str(tmp_path / "new"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: {message}.*fewer --workers need less", error)
    assert "Traceback" not in error
    assert not [path.name for path in tmp_path.iterdir() if "new" in path.name]


def _plan_of(plan: Any, tree: Any, directory: Path, _: int, limits: DataConfig) -> list[Shard]:
    shards: list[Shard] = plan(tree, directory, 8192, limits)
    return shards
