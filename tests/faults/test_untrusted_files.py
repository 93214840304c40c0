"""Files from untrusted places are read, or refused, but never executed."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.data.shard_writer import shard_command
from arsg_dist.imagenet.data.tar_shards import TarShards
from tests.support.hostile import Payload


def test_every_file_of_a_checkpoint_replaced_by_a_pickle(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a loader that executes what a checkpoint says: pickles, plain or as torch.save writes them."""
    assert train_command([*recipe, "--epochs", "1"]) == 0
    run, marker = tmp_path / "run", tmp_path / "executed"
    files = [path for path in (run / "checkpoints").glob("step-*/**/*") if path.is_file()]
    assert len(files) > 1
    for path in files:
        shutil.copy(path, tmp_path / "kept")
        for write in (
            lambda p: p.write_bytes(pickle.dumps(Payload(marker))),
            lambda p: torch.save({"model": Payload(marker)}, p),
        ):
            write(path)
            code = train_command([*recipe, "--epochs", "2", "--resume", "--max_updates", "5"])
            shown = capsys.readouterr()
            assert not marker.exists(), path
            assert path.name == "score.json" or code == 2, (path, shown.err)
            assert "Traceback" not in shown.err
        shutil.copy(tmp_path / "kept", path)


def test_a_pickle_in_the_index_of_shards(small_tree: Path, tmp_path: Path) -> None:
    """Catches numpy's pickles, in an index whose checksum fits."""
    assert shard_command([str(small_tree), str(tmp_path / "shards"), "--workers", "1"]) == 0
    split, marker = tmp_path / "shards" / "train", tmp_path / "executed"
    evil = np.array([Payload(marker)], dtype=object)
    (split / "index.npy").unlink()
    np.save(split / "index.npy", evil, allow_pickle=True)
    description = json.loads((split / "split.json").read_text())
    description["index_sha256"] = hashlib.sha256((split / "index.npy").read_bytes()).hexdigest()
    (split / "split.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"index\.npy is no array of records"):
        TarShards(split)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../other.tar", "/etc/passwd", "a/b.tar"])
def test_shards_outside_their_directory(name: str, small_tree: Path, tmp_path: Path) -> None:
    """Catches a description that makes the program read other files."""
    assert shard_command([str(small_tree), str(tmp_path / "shards"), "--workers", "1"]) == 0
    split = tmp_path / "shards" / "train"
    description = json.loads((split / "split.json").read_text())
    description["shards"][0]["name"] = name
    (split / "split.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"split\.json is not as"):
        TarShards(split)


def test_an_image_that_is_a_pickle(
    recipe: list[str], small_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a decoder that tries more formats than images."""
    marker = tmp_path / "executed"
    path = sorted((small_tree / "train" / "3").iterdir())[2]
    path.write_bytes(pickle.dumps(Payload(marker)))
    assert train_command(recipe) == 2
    assert f"cannot decode image {path}" in capsys.readouterr().err
    assert not marker.exists()
