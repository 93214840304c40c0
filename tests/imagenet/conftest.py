import shutil
from pathlib import Path

import pytest

from arsg_dist.imagenet.data.builtin import digits_tree


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_tree(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def small_tree(digits: Path, tmp_path: Path) -> Path:
    """Three digits, 20 training and 7 validation images of each: 60 and 21, no multiple of 2 × 2."""
    root = tmp_path / "small"
    for split, count in (("train", 20), ("val", 7)):
        for digit in "036":
            target = root / split / digit
            target.mkdir(parents=True)
            for path in sorted((digits / split / digit).iterdir())[:count]:
                shutil.copy(path, target)
    return root


@pytest.fixture
def recipe(small_tree: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run that takes seconds."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data: {{root: {small_tree}, augmentation: crop, image_size: 16, crop_size: 14, workers: 0}}\n"
        "model: resnet20\nepochs: 2\nbatch_size: 12\nval_batch_size: 4\nlog_every: 2\n"
        "optimizer: {type: ARSG, params: {lr: 0.01, mu: 0.1}}\n"
        "schedule: {name: cosine, warmup_epochs: 0.5}\n"
    )
    return ["--config", str(path), "--output", str(tmp_path / "run")]
