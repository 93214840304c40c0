from pathlib import Path

import pytest
import torch
from PIL import Image

from arsg_dist.imagenet.config import DataConfig, ProgressiveConfig
from arsg_dist.imagenet.data import dataset
from arsg_dist.imagenet.data.builtin import digits_tree
from arsg_dist.imagenet.data.dataset import collate, loader, open_splits
from arsg_dist.imagenet.data.folder import ImageTree
from arsg_dist.imagenet.data.sampler import IGNORED, SampleKey, TrainingSampler, ValidationSampler

CONFIG = DataConfig(augmentation="crop", image_size=16, crop_size=14, workers=0)


@pytest.mark.parametrize("images", [1, 2, 21, 24, 25])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_counts_every_image_once_in_equally_many_batches(images: int, world_size: int) -> None:
    """Catches padding that counts images twice, and ranks with fewer batches (a hang under ZeRO-3)."""
    ranks = [
        list(ValidationSampler(images, batch_size=4, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    indices = [key.image for batches in ranks for batch in batches for key in batch if key.image != IGNORED]
    assert sorted(indices) == list(range(images))
    assert {len(batch) for batches in ranks for batch in batches} == {4}


def test_augmentation_depends_on_seed_epoch_and_image_alone(small_tree: Path) -> None:
    """Catches random crops that depend on what was loaded before (no exact resume), or disturb global state."""
    train, _ = open_splits(small_tree, CONFIG, seed=1)
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    first = train[SampleKey(0, 5)][0]
    assert torch.equal(torch.rand(1), before)
    _ = train[SampleKey(0, 6)]
    assert torch.equal(train[SampleKey(0, 5)][0], first)
    assert any(not torch.equal(train[SampleKey(epoch, 5)][0], first) for epoch in range(1, 9))


def test_undecodable_images_are_named_and_do_not_count(small_tree: Path) -> None:
    """Catches a corrupt file that ends the loader with a traceback, or gets a label in the batch."""
    broken = sorted((small_tree / "train" / "0").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:200])
    empty = sorted((small_tree / "train" / "3").iterdir())[0]
    empty.write_bytes(b"")
    train, _ = open_splits(small_tree, CONFIG, seed=1)
    batch = collate([train[SampleKey(0, index)] for index in range(22)], image_size=14)
    assert batch.images.shape == (22, 3, 14, 14)
    assert sorted(batch.labels.tolist()) == [IGNORED] * 2 + [0] * 19 + [1]
    assert any(str(broken) in message for message in batch.bad)
    assert any(str(empty) in message for message in batch.bad)
    assert collate([None, "cannot"], image_size=14).images.shape == (2, 3, 14, 14)


def test_worker_processes_give_the_same_batches(small_tree: Path) -> None:
    """Catches workers that augment or order differently from loading in the training process."""
    train, _ = open_splits(small_tree, CONFIG, seed=1)
    batches = TrainingSampler(60, epochs=1, batch_size=12, accumulation_steps=1, rank=0, world_size=2, seed=5)
    here = list(loader(train, batches, workers=0, image_size=14, pin_memory=False))
    workers = loader(train, batches, workers=2, image_size=14, pin_memory=False)
    for one, other in zip(here, workers, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_missing_empty_and_differing_directories_are_named(small_tree: Path, tmp_path: Path) -> None:
    """Catches a traceback from the depths of torchvision where the user needs the directory's name."""
    with pytest.raises(ValueError, match="does not exist"):
        ImageTree(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"test does not exist; .* has train, val"):
        open_splits(small_tree, DataConfig(val_split="test"), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a usable ImageFolder tree"):
        ImageTree(tmp_path / "empty")
    (small_tree / "val" / "6").rename(small_tree / "val" / "7")
    with pytest.raises(ValueError, match="only in train: 6; only in val: 7"):
        open_splits(small_tree, CONFIG, seed=0)


def test_digits_are_whole_even_when_two_processes_write_them(digits: Path, tmp_path: Path) -> None:
    """Catches a tree used while it is half written, and a second writer that fails or mixes in."""
    assert sum(1 for _ in (digits / "train").rglob("*.jpg")) == 1442
    assert sum(1 for _ in (digits / "val").rglob("*.jpg")) == 355
    other = tmp_path / "data" / "digits"
    real_rename = Path.rename

    def rename_late(self: Path, target: Path) -> Path:
        if target == other and not other.exists():
            target.mkdir(parents=True)
            (target / "someone else's").touch()
        return real_rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename_late)
        digits_tree(other)
    assert [path.name for path in other.parent.iterdir()] == ["digits"]


def test_an_image_has_the_size_of_its_batch_and_the_crop_of_its_epoch(small_tree: Path) -> None:
    """Catches a batch over the border of two epochs whose images get two sizes, and a crop that the batch decides."""
    progressive = ProgressiveConfig(start_size=8, end_epoch=1, multiple=2)
    config = DataConfig(augmentation="imagenet", image_size=16, progressive=progressive, workers=0)
    train, _ = open_splits(small_tree, config, seed=1)
    sizes = {
        key: train[SampleKey(*key)][0].shape[-1]
        for key in ((0, 5, True, 0), (1, 5, True, 0), (1, 5, True, 1))
    }
    assert list(sizes.values()) == [8, 8, 16]
    assert not torch.equal(train[SampleKey(0, 5, True, 1)][0], train[SampleKey(1, 5, True, 1)][0])


def test_a_place_that_only_fills_up_has_no_label_and_no_fault(small_tree: Path) -> None:
    """Catches an image that counts twice, or a broken file reported again where it fills a batch up."""
    broken = sorted((small_tree / "train" / "0").iterdir())[0]
    broken.write_bytes(b"")
    train, _ = open_splits(small_tree, CONFIG, seed=1)
    assert train[SampleKey(0, 1, False)][1] == IGNORED
    assert train[SampleKey(0, 0, False)] is None
    assert str(broken) in train[SampleKey(0, 0)]


def test_an_image_too_narrow_to_be_resized_is_a_bad_image(small_tree: Path) -> None:
    """Catches memory for a thousand times its pixels: validation makes the shorter side as long as the crop needs."""
    narrow = sorted((small_tree / "val" / "0").iterdir())[0]
    Image.new("RGB", (2000, 1)).save(narrow, "PNG")
    edge = 18  # round(16 × 256 / 224)
    for limit, bad in ((edge * edge * 2000 - 1, True), (edge * edge * 2000, False)):
        config = DataConfig(augmentation="imagenet", image_size=16, workers=0, max_image_pixels=limit)
        sample = open_splits(small_tree, config, seed=1)[1][SampleKey(0, 0)]
        assert isinstance(sample, str) == bad
        if bad:
            assert f"{narrow}: 2000 × 1 pixels: with 18 on the shorter side" in sample


def test_an_image_without_memory_for_it_is_named_and_ends_the_run(
    small_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a machine without memory taken for bad images, which would be skipped one after another."""
    train, _ = open_splits(small_tree, CONFIG, seed=1)

    def decode(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(dataset, "decode", decode)
    with pytest.raises(MemoryError, match=r"no memory left to decode image .*train/0/"):
        train[SampleKey(0, 2)]


def test_how_long_to_wait_is_refused_without_loader_processes() -> None:
    """Catches a setting that nothing reads, and one below zero, which would end every run."""
    assert DataConfig(timeout=0).timeout == 0
    for settings in ({"workers": 0, "timeout": 60.0}, {"timeout": -1.0}):
        with pytest.raises(ValueError, match=r"data\.timeout"):
            DataConfig(**settings)  # type: ignore[arg-type]
