"""The ImageNet recipe on small images: its runs through `arsg-imagenet`, its choice of learning rates, its table."""

from __future__ import annotations

import io
import json
import math
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from benchmarks.imagenet_like import __main__ as command
from benchmarks.imagenet_like.__main__ import Protocol, Run, choose, make_tree, paired, search


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A tar file of 10 classes with 3 and 2 images each, all of different colours."""
    path = tmp_path / "images.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for split, count in (("train", 3), ("test", 2)):
            for place in range(10 * count):
                picture = io.BytesIO()
                Image.new("RGB", (12, 12), (8 * place, 40, 200)).save(picture, "JPEG")
                member = tarfile.TarInfo(f"{split}/class{place // count}/{place % count:04}.jpg")
                member.size = picture.tell()
                picture.seek(0)
                archive.addfile(member, picture)
    return path


def test_a_learning_rate_that_diverged_is_not_chosen() -> None:
    """Catches NaN, which every comparison calls no less than anything."""
    assert choose({0.1: math.nan, 0.2: 2.0, 0.3: 1.5, 0.4: math.inf}) == 0.3
    mean, half = paired([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.303 * math.sqrt(7 / 3) / math.sqrt(3))


def test_the_search_goes_on_while_the_best_rate_is_at_an_end() -> None:
    """Catches a best rate at the end of what was tried, one search for some and another for others, one without end."""
    asked: list[float] = []

    def valley(lowest: float) -> dict[float, float]:
        asked.clear()

        def error(lr: float) -> float:
            asked.append(lr)
            return abs(math.log(lr / lowest))

        return search((1.0, 4.0, 16.0), error)

    assert list(valley(4.0)) == asked == [1.0, 4.0, 16.0]
    assert list(valley(1.0)) == [0.25, 1.0, 4.0, 16.0]
    assert choose(valley(64.0)) == 64.0
    assert asked == [1.0, 4.0, 16.0, 64.0, 256.0]
    assert list(valley(1e9)) == [1.0, 4.0, 16.0, 64.0, 256.0]
    assert len(search((1.0, 4.0), lambda _: math.nan)) == 3


def test_each_recipe_trains_once_through_the_program(archive: Path, tmp_path: Path) -> None:
    """Catches a recipe with a setting that the program refuses, the wrong images, a run that is done twice."""
    protocol, tree = Protocol("resnet20", 8, 2, 1, 10, 1, 1, 3), tmp_path / "images"
    make_tree(archive, tree, protocol)
    assert len(list(tree.glob("train/*/*.jpg"))) == 20
    assert sorted(path.name for path in tree.glob("val/*/*.jpg")) == 10 * ["0000.jpg"]
    for name, tried in command.LEARNING_RATES.items():
        run = Run(name, tried[1], 2, 1)
        epochs = command.carry_out(run, protocol, tree, tmp_path, math.inf)
        settings = yaml.safe_load((tmp_path / run.name / "config.yaml").read_text())
        assert settings["optimizer"]["params"]["lr"] == tried[1]
        assert settings["seed"] == 2
        assert math.isfinite(epochs[0]["val_loss"])
        assert command.carry_out(run, protocol, tree, tmp_path, 0.0) == epochs
    with pytest.raises(SystemExit, match="no time"):
        command.carry_out(Run("sgd", 1.0, 2, 1), protocol, tree, tmp_path, 0.0)
    with pytest.raises(SystemExit, match="has not 4 images"):
        make_tree(archive, tmp_path / "more", Protocol("resnet20", 8, 4, 1, 10, 1, 1, 3))
    assert not (tmp_path / "more").exists()


def test_the_table_has_the_chosen_rates_and_paired_differences(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches trials among the results, seeds paired with others, and the seed that chose among those reported."""
    done: list[Run] = []

    def carry_out(run: Run, *_: Any) -> list[dict[str, Any]]:
        done.append(run)
        tried = command.LEARNING_RATES[run.optimizer]
        best = {"sgd": 0.000625, "adamw": tried[1], "arsg": tried[1]}[run.optimizer]
        worse = abs(math.log(run.lr / best))
        loss = 1 + 3 * worse + {"sgd": 0.5, "adamw": 0.0, "arsg": 0.01}[run.optimizer] + 0.2 * run.seed
        if run.optimizer == "adamw":
            loss += 0.1 * (run.seed == 2)
        top1 = 0.9 - 0.1 * worse
        if run.lr == 0.08:  # as a net that calls all classes alike
            loss, top1 = 0.1, 0.1
        return [{"train_loss": loss, "val_loss": math.nan if run.lr == 4e-3 else loss, "val_top1": top1}]

    monkeypatch.setattr(command, "carry_out", carry_out)
    report = tmp_path / "table.md"
    arguments = ["--cifar10", str(archive), "--output", str(tmp_path / "runs"), "--report", str(report)]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--train-images=3", "--val-images=2", "--batch=7"])
    command.main()
    assert [run.seed for run in done] == 11 * [0] + [1, 1, 1, 2, 2, 2, 3, 3, 3]
    text = report.read_text()
    assert "| SGD | 0.000625, 0.0025, 0.01, 0.04, 0.16: 0.000625 | 1.900 (1.700, 1.900, 2.100) |" in text
    assert "epochs of 5 updates" in text
    assert "- validation loss, minus SGD: -0.490 ± 0.000 (lower)" in text
    assert "- validation loss, minus AdamW: -0.023 ± 0.143 (no difference shown)" in text
    assert "- validation top-1, %, minus SGD: +0.000 ± 0.000 (no difference shown)" in text
    assert "while the best is at an end; it still is for SGD." in text
    assert "(table.json)" in text
    runs = json.loads(report.with_suffix(".json").read_text())["runs"]
    assert [run["kind"] for run in runs] == 11 * ["search"] + 9 * ["final"]
    monkeypatch.setattr(sys, "argv", ["x", *arguments, "--train-images=2"])
    with pytest.raises(SystemExit, match="another protocol"):
        command.main()
