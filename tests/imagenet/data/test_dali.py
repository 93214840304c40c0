"""The DALI loader, with DALI's CPU operators in place of those on a GPU, where it has not run yet."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from arsg_dist.imagenet.config import DataConfig, ProgressiveConfig
from arsg_dist.imagenet.data import dali
from arsg_dist.imagenet.data.dali import CollateEncoded, DaliLoader, EncodedSplit, check_dali
from arsg_dist.imagenet.data.dataset import ImageSplit, loader, open_splits
from arsg_dist.imagenet.data.sampler import IGNORED, TrainingSampler, ValidationSampler
from arsg_dist.imagenet.data.transforms import normalised

CONFIG = DataConfig(image_size=56, workers=0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of smooth pictures in which every place has a colour of its own, some upright, one grey."""
    for split in ("train", "val"):
        for number in range(10):
            width, height = (120, 90) if number % 3 else (80, 130)
            across = torch.linspace(0, 255, width).expand(height, width)
            down = torch.linspace(0, 255, height)[:, None].expand(height, width)
            pixels = torch.stack([across, down, torch.full_like(across, 25.0 * number)], dim=2)
            image = Image.fromarray(pixels.round().byte().numpy())
            folder = tmp_path / split / ("cat" if number < 6 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            (image.convert("L") if number == 4 else image).save(folder / f"{number}.jpg", quality=95)
    return tmp_path


def train_sampler(position: int = 0) -> TrainingSampler:
    order = TrainingSampler(10, epochs=2, batch_size=8, accumulation_steps=1, rank=0, world_size=2, seed=5)
    order.position = position
    return order


@pytest.mark.parametrize("kind", ["train", "progressive", "none", "val"])
def test_dali_gives_the_images_of_the_pillow_loader(kind: str, photos: Path) -> None:
    """Catches another crop, a lost flip, labels that shift against the images, and another normalisation."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI (extra dali) is not installed")
    progressive = ProgressiveConfig(start_size=32, end_epoch=1) if kind == "progressive" else None
    config = DataConfig(
        image_size=56,
        workers=0,
        augmentation="none" if kind == "none" else "imagenet",
        progressive=progressive or ProgressiveConfig(),
    )
    train = kind != "val"
    split = open_splits(photos, config, seed=1)[0 if train else 1]
    assert isinstance(split, ImageSplit)
    order = train_sampler(8) if train else ValidationSampler(10, batch_size=4, rank=1, world_size=2)
    pillow = loader(split, order, workers=0, image_size=56, pin_memory=False)
    decoded = DaliLoader(
        split,
        order,
        config=config,
        train=train,
        batch_size=4,
        image_size=56,
        seed=1,
        device=torch.device("cpu"),
    )
    for _ in range(2):  # validation goes over its loader once per epoch
        pairs = list(zip(pillow, decoded, strict=True))
        assert len(pairs) == len(order)
        for expected, found in pairs:
            assert torch.equal(found.labels, expected.labels)
            counts = expected.labels != IGNORED
            error = (found.images - normalised(expected.images))[counts].abs()
            # Units of 1/58 of the range; the two round and filter edges differently, a wrong crop or flip is off by 1.
            assert error.mean() < 0.05


def test_bad_and_missing_images_are_filled_up(photos: Path) -> None:
    """Catches a batch of another size, and a file that is no image reaching DALI, which would end the run."""
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"no image")
    split = open_splits(photos, CONFIG, seed=1)[0]
    assert isinstance(split, ImageSplit)
    encoded = EncodedSplit(split.source, CONFIG, train=True, seed=1)
    collate = CollateEncoded(56)
    batch = collate([encoded[key] for key in [(0, 1), (0, 2), (0, IGNORED), (0, 3, False)]])  # type: ignore[index]
    assert [image.label for image in batch.images] == [0, IGNORED, IGNORED, IGNORED]
    assert len(batch.bad) == 1
    assert "2.jpg" in batch.bad[0]
    assert [image.label for image in collate([None, None]).images] == [IGNORED, IGNORED]


class Refusing:
    """DALI's pipeline, as far as the loader sees it: it raises with its third batch, when the fourth is under way."""

    def __init__(self, source: Any) -> None:
        self.source, self.made = source, 0

    def run(self) -> tuple[Any]:
        self.made += 1
        self.source()
        if self.made == 3:
            self.source()
            raise RuntimeError("nvJPEG error")
        pixels = torch.full((2, 3, 56, 56), float(self.made))
        return (SimpleNamespace(as_tensor=lambda: pixels),)


def validation(
    pipeline: type, images: int, device: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> DaliLoader:
    """The loader over a pipeline of the tests."""
    monkeypatch.setattr(dali, "_pipeline", lambda source, *_: pipeline(source))
    return DaliLoader(
        open_splits(photos, CONFIG, seed=1)[1],  # type: ignore[arg-type]
        ValidationSampler(images, batch_size=2, rank=0, world_size=1),
        config=CONFIG,
        train=False,
        batch_size=2,
        image_size=56,
        seed=1,
        device=torch.device(device),
    )


def test_dali_gets_its_memory_back_when_the_copy_is_made(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a GPU's copy of a batch that is still to be made when DALI decodes the next one into the same memory."""
    order: list[str] = []

    class Pipeline(Refusing):
        def run(self) -> tuple[Any]:
            order.append("run")
            self.made += 1
            self.source()
            pixels = SimpleNamespace(clone=lambda: order.append("copy") or torch.zeros(2, 3, 56, 56))
            return (SimpleNamespace(as_tensor=lambda: pixels),)

        def reset(self) -> None:
            pass

    class Event:
        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("wait")

    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", lambda pixels: pixels)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert len(list(validation(Pipeline, 4, "cuda", photos, monkeypatch))) == 2
    assert order == ["run", "copy", "record", "wait", "run", "copy", "record", "wait", "run"]


@pytest.mark.parametrize("damaged", [True, False])
def test_an_image_that_dali_cannot_decode_is_named(
    damaged: bool, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a whole batch of names where one image is bad, a rank that ends alone, batches that are missing after it
    (the others would wait), and an image blamed for an error that is not its own."""
    path = photos / "val" / "dog" / "7.jpg"
    if damaged:
        path.write_bytes(path.read_bytes()[:-300])  # the header is whole
    loader = validation(Refusing, 10, "cpu", photos, monkeypatch)
    if not damaged:
        with pytest.raises(RuntimeError, match=r"could not decode one of .*4\.jpg.*7\.jpg: nvJPEG error"):
            list(loader)
        return
    batches = list(loader)
    assert [float(batch.images[0, 0, 0, 0]) for batch in batches] == [1, 2, 0, 0, 0]
    assert [batch.labels.tolist() for batch in batches] == [[0, 0], [0, 0], *[[IGNORED, IGNORED]] * 3]
    assert [len(batch.bad) for batch in batches] == [0, 0, 1, 0, 0]
    assert str(path) in batches[2].bad[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augmentation": "crop", "crop_size": 28}, "augmentation: crop"),
        ({"rand_augment": 9}, "rand_augment"),
        ({"random_erasing": 0.1}, "random_erasing"),
        ({"source": "synthetic"}, "synthetic"),
        ({"on_bad_image": "skip"}, "on_bad_image: skip"),
    ],
)
def test_what_dali_does_not_offer_is_refused(settings: dict[str, object], message: str) -> None:
    """Catches a setting that is silently ignored."""
    with pytest.raises(ValueError, match=message):
        DataConfig(loader="dali", **settings)  # type: ignore[arg-type]


def test_dali_without_gpu_or_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback from the depths of DALI after the ranks have started."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        check_dali()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"pip install 'arsg-dist\[dali\]'"):
        check_dali()
