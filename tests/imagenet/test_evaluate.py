"""`arsg-imagenet evaluate`: the numbers of the run, of other programs, and of a count by hand."""

import argparse
import json
import os
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from arsg_dist.imagenet import evaluate
from arsg_dist.imagenet.cli import evaluate_command
from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.builtin import SyntheticSplit
from arsg_dist.imagenet.data.transforms import normalised
from arsg_dist.imagenet.torchvision_compat import torchvision, v2
from arsg_dist.imagenet.trained import open_trained
from arsg_dist.imagenet.training import setup as training
from tests.imagenet.jobs.small_network import SmallResNet
from tests.imagenet.test_run_by_hand import ByHand, _linear_network, build_model, recipe, start
from tests.support.launchers import launch

linear_network = _linear_network  # of whole runs in this process


def evaluated(*arguments: object) -> dict[str, Any]:
    output = Path(str(arguments[-1]))
    assert evaluate_command([*map(str, arguments[:-1]), "--output", str(output)]) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


# Of a run, against the numbers worked out by hand


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of a linear network, 10 images validated 3 at a time."""
    monkeypatch.setattr(evaluate, "build_model", build_model)
    assert start(tmp_path / "run", recipe()) == 0
    return tmp_path / "run"


def test_a_runs_checkpoint_scores_what_was_worked_out_at_each_point(run: Path, tmp_path: Path) -> None:
    """Catches places that fill the last batch up and count, x for θ or the average, and another checkpoint than the
    newest."""
    x, theta = (ByHand(recipe()).run(theta=at_theta).records[-1] for at_theta in (False, True))
    right = {
        "x": (x["val_loss"], x["val_top1"]),
        "theta": (theta["val_loss"], theta["val_top1"]),
        "ema": (x["ema_val_loss"], x["ema_val_top1"]),
    }
    assert len({round(loss, 4) for loss, _ in right.values()}) == 3
    for at, (loss, top1) in right.items():
        found = evaluated(run, "--at", at, tmp_path / "found.json")
        assert (found["loss"], found["top1"]) == (pytest.approx(loss, rel=1e-5), pytest.approx(top1)), at
        assert (found["images"], found["top5"], found["bad_images"]) == (10, 1.0, 0)
    newest = max((run / "checkpoints").glob("step-*"))
    first = min((run / "checkpoints").glob("step-*"))
    assert evaluated(newest, tmp_path / "found.json")["loss"] == pytest.approx(x["val_loss"], rel=1e-5)
    assert evaluated(first, tmp_path / "found.json")["loss"] != pytest.approx(x["val_loss"], rel=1e-5)
    weights = run / "weights" / "ema.safetensors"
    assert evaluated(weights, tmp_path / "found.json")["loss"] == pytest.approx(x["ema_val_loss"], rel=1e-5)
    # A flag wins over the run's settings.
    more = evaluated(run, "--data.synthetic_images", 7, tmp_path / "found.json")
    assert more["images"] == 7


class Tied(nn.Module):
    """The linear network, its weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.again = build_model(), nn.Module()
        self.again.weight = self.layers[1].weight

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def test_the_average_of_a_network_with_two_names_for_a_parameter_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an average of which the second name is missing, as a checkpoint has it once."""
    for module in (training, evaluate):
        monkeypatch.setattr(module, "build_model", lambda *_, **__: Tied())
    assert start(tmp_path / "run", recipe()) == 0
    right = ByHand(recipe()).run().records[-1]["ema_val_loss"]
    found = evaluated(tmp_path / "run", "--at", "ema", tmp_path / "found.json")
    assert found["loss"] == pytest.approx(right, rel=1e-5)


def test_ranks_compare_the_weights_that_they_have_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hosts with different files under one path, whose scores would be averaged."""
    compared = list[Any]()
    monkeypatch.setattr(
        evaluate, "check_agreement", lambda _, **values: compared.append(values.get("weights"))
    )
    for at in ("x", "ema", "x"):
        evaluated(run, "--at", at, tmp_path / "found.json")
    assert compared[0] == compared[2] != compared[1]


def test_only_a_prefix_of_all_names_is_ddps(tmp_path: Path) -> None:
    """Catches a network with a part of its own that is called module, whose names lose it."""
    for names, expected in (
        (["module.weight", "head.weight"], {"module.weight", "head.weight"}),
        (["module.body.weight", "module.head.weight"], {"body.weight", "head.weight"}),
    ):
        torch.save({name: torch.ones(1) for name in names}, tmp_path / "weights.pth")
        assert set(open_trained(tmp_path / "weights.pth").weights) == expected


# On ranks, against a count by hand

SYNTHETIC = {"synthetic_images": 11, "synthetic_classes": 7, "image_size": 8}


def small_state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = SmallResNet(7)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else 0))
    return model.state_dict()


@cache
def counted_by_hand() -> tuple[float, float, float]:
    """Loss, top-1 and top-5, image by image."""
    model = SmallResNet(7)
    model.load_state_dict(small_state())
    split = SyntheticSplit(DataConfig(source="synthetic", workers=0, **SYNTHETIC), train=False, seed=0)
    losses, first, among = [], [], []
    for index in range(len(split)):
        image, label = split[(0, index, True, 0)]  # type: ignore[index, misc]
        with torch.no_grad():
            (logits,) = model.eval()(normalised(image[None])).double()
        losses.append(functional.cross_entropy(logits, torch.tensor(label)).item())
        place = int((logits > logits[label]).sum())
        first.append(place == 0)
        among.append(place < 5)
    return sum(losses) / len(losses), sum(first) / len(first), sum(among) / len(among)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("launcher", "ranks", "options"),
    [
        ("warm torchrun", 3, []),
        ("warm deepspeed", 2, ["--engine", "deepspeed"]),
        ("warm horovodrun", 2, []),
        ("warm alone", 1, []),
    ],
)
def test_the_counts_are_exact_on_any_number_of_ranks(
    launcher: str, ranks: int, options: list[str], tmp_path: Path
) -> None:
    """Catches a mean of the ranks' means, padding that counts, images that two ranks count, and a launcher whose ranks
    do not meet: 11 images over 3 ranks, 2 at a time."""
    torch.save(small_state(), tmp_path / "weights.pth")
    flags = [f"--data.{name}={value}" for name, value in SYNTHETIC.items()]
    job = launch(
        launcher,
        ranks,
        "tests/imagenet/jobs/evaluate_job.py",
        *("--weights", tmp_path / "weights.pth", "--model", "resnet20", "--data.source", "synthetic"),
        *("--data.workers", 0, "--val_batch_size", 2, "--output", tmp_path / "found.json", *flags, *options),
    )
    assert job.code == 0, job.output[-5000:]
    found = json.loads((tmp_path / "found.json").read_text())
    loss, top1, top5 = counted_by_hand()
    assert 0 < top1 < top5 < 1
    assert (found["top1"], found["top5"], found["images"]) == (top1, top5, 11)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["world_size"] == ranks
    assert job.output.count("top-1") == 1


# Weights of other libraries, against their own way of measuring


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Photos whose sides differ, of three classes; there is no training split."""
    root = tmp_path_factory.mktemp("tree")
    for digit in "138":
        (root / "val" / digit).mkdir(parents=True)
        for path in sorted((digits / "val" / digit).iterdir())[:4]:
            shutil.copy(path, root / "val" / digit)
    return root


def measured_elsewhere(model: nn.Module, tree: Path, transform: Any) -> tuple[float, float]:
    data = torchvision.datasets.ImageFolder(tree / "val", transform)
    images, labels = zip(*(data[index] for index in range(len(data))), strict=True)
    with torch.no_grad():
        logits = model.eval()(torch.stack(images))
    right = torch.tensor(labels)
    return functional.cross_entropy(logits, right).item(), (logits.argmax(1) == right).float().mean().item()


def scattered(model: nn.Module) -> nn.Module:
    """Give batch norm statistics and the classifier something to tell apart."""
    torch.manual_seed(5)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(0.1 * torch.randn_like(tensor))
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand_like(tensor))
        elif name.startswith(("fc.", "head.")):
            tensor.copy_(torch.randn_like(tensor))
    return model


def test_torchvisions_weights_score_as_torchvision_measures_them(tree: Path, tmp_path: Path) -> None:
    """Catches another resizing, crop or normalisation than torchvision's evaluation has, --resize and --interpolation
    without effect, and weights that torch.save wrote under DistributedDataParallel and are not found."""
    model = scattered(torchvision.models.resnet18(num_classes=3))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "weights.pth")
    for resize, bicubic in ((None, False), (40, True), (28, True)):  # the last one is the crop's own size
        how = v2.InterpolationMode.BICUBIC if bicubic else v2.InterpolationMode.BILINEAR
        transform = v2.Compose(
            [
                v2.Resize(resize or 32, how),
                v2.CenterCrop(28),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        loss, top1 = measured_elsewhere(model, tree, transform)
        given = ["--resize", resize, "--interpolation", "bicubic"] if resize else []
        found = evaluated(
            *("--weights", tmp_path / "weights.pth", "--model", "resnet18", "--data.root", tree),
            *("--data.image_size", 28, "--data.workers", 0, "--val_batch_size", 5, *given),
            tmp_path / "found.json",
        )
        assert found["images"] == 12
        assert (found["loss"], found["top1"]) == (pytest.approx(loss, rel=1e-4), pytest.approx(top1))


def test_timms_weights_score_as_timm_measures_them(tree: Path, tmp_path: Path) -> None:
    """Catches ImageNet's normalisation for a network that has another, and a training's average taken for its
    weights."""
    timm = pytest.importorskip("timm")
    model, average = (scattered(timm.create_model("test_vit", num_classes=3, img_size=32)) for _ in range(2))
    with torch.no_grad():
        average.head.weight.mul_(-1)
    content = {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict(), "arch": "test_vit"}
    torch.save(content, tmp_path / "weights.pth.tar")
    transform = timm.data.create_transform(32, mean=0.5, std=0.25, interpolation="bicubic", crop_pct=32 / 36)
    options = ["--weights", tmp_path / "weights.pth.tar", "--model", "timm:test_vit", "--data.root", tree]
    options += ["--data.image_size", 32, "--data.workers", 0, "--resize", 36, "--interpolation", "bicubic"]
    options += ["--mean", 0.5, "--std", 0.25, 0.25, 0.25]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluate, "build_model", lambda *_: timm.create_model("test_vit", num_classes=3, img_size=32)
        )
        for at, network in (("x", model), ("ema", average)):
            loss, top1 = measured_elsewhere(network, tree, transform)
            found = evaluated(*options, "--at", at, tmp_path / "found.json")
            assert (found["loss"], found["top1"]) == (pytest.approx(loss, rel=1e-4), pytest.approx(top1)), at


PHOTOS = os.environ.get("ARSG_PHOTOS", "")
"""A tree with `val/CLASS/*.JPEG` of real photographs, one or more of each class."""


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS, reason="ARSG_PHOTOS names no tree of photographs")
@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("ResNet18_Weights.IMAGENET1K_V1", []),
        ("ResNet50_Weights.IMAGENET1K_V2", ["--resize", 232]),
        ("GoogLeNet_Weights.IMAGENET1K_V1", []),
        ("timm:resnet18.a1_in1k", ["--resize", 235, "--interpolation", "bicubic"]),
        (
            "timm:mixer_b16_224.goog_in21k_ft_in1k",
            ["--mean", 0.5, "--std", 0.5, "--interpolation", "bicubic"],
        ),
    ],
)
def test_photographs_count_as_the_owners_of_published_weights_count_them(
    weights: str, options: list[object], tmp_path: Path
) -> None:
    """Catches pixels that differ from those that published numbers were measured on, at the sizes of ImageNet.

    What torchvision and timm state of the weights prepares the images; the network is one that tells these classes
    apart by random features, and whose answers hang on single pixels.
    """
    timm = pytest.importorskip("timm")
    if weights.startswith("timm:"):
        config = timm.data.resolve_data_config(timm.get_pretrained_cfg(weights[5:]).to_dict())
        transform = timm.data.create_transform(**config, is_training=False)
    else:
        transform = torchvision.models.get_weight(weights).transforms()
    data = torchvision.datasets.ImageFolder(Path(PHOTOS) / "val", transform)
    images, labels = (torch.stack([torch.as_tensor(row[part]) for row in data]) for part in (0, 1))
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=len(data.classes)).eval()
    with torch.no_grad():
        head, model.fc = model.fc, nn.Identity()
        features = torch.cat([model(part) for part in images.split(50)])
        mean = torch.stack([features[labels == label].mean(0) for label in range(len(data.classes))])
        spread = (mean - mean.mean(0)).std()
        head.weight.copy_(mean - mean.mean(0) + 0.5 * spread * torch.randn_like(mean))
        head.bias.copy_(-(head.weight @ mean.mean(0)) - head.weight.square().sum(1) / 2)
        model.fc, logits = head, head(features).double()
    place = (logits > logits.gather(1, labels[:, None])).sum(1)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    found = evaluated(
        *("--weights", tmp_path / "weights.pth", "--model", "resnet18", "--data.root", PHOTOS),
        *("--val_batch_size", 50, "--data.workers", 0, *options, tmp_path / "found.json"),
    )
    top1, top5 = ((place < k).double().mean().item() for k in (1, 5))
    assert 0.1 < top1 < 0.9, "nothing can be told from it"
    assert (found["top1"], found["top5"], found["images"]) == (top1, top5, len(data))
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-4)


# What cannot be measured


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made",)


def test_what_cannot_be_measured_is_said_in_a_line(
    run: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a pickle that is executed, a traceback, and a setting that is given and not used."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, "harmful.pth")
    torch.save({"weight": torch.ones(2)}, "old.pth", _use_new_zipfile_serialization=False)
    torch.save([1, 2], "list.pth")
    torch.save({"optimizer": {"lr": 1}}, "nothing.pth")
    save_file({"1.weight": torch.full((3, 48), torch.nan), "1.bias": torch.ones(3)}, "nan.safetensors")
    save_file({"1.weight": torch.ones(4, 48), "2.bias": torch.ones(3)}, "others.safetensors")
    Path("damaged.safetensors").write_bytes(b"no")
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "latest").touch()
    synthetic = [
        "--data.source",
        "synthetic",
        "--data.synthetic_images",
        "4",
        "--data.synthetic_classes",
        "3",
    ]
    of_model = ["--model", "resnet20", *synthetic, "--data.image_size", "4", "--data.workers", "0"]
    folder = ["--model", "resnet20", "--data.root", str(tree)]
    for arguments, said in [
        ([], "nothing says what to evaluate"),
        ([str(run), "--weights", "nan.safetensors"], "not both"),
        (["nowhere"], "there is no nowhere"),
        ([str(tmp_path)], "no run (no config.yaml) and no checkpoint"),
        (["zero", *of_model], "arsg-dist checkpoint convert zero OUTPUT"),
        (["harmful.pth", *of_model], "names posix.mkdir, which loading it would execute"),
        (["old.pth", *of_model], "write it anew: python -c"),
        (["list.pth", *of_model], "holds list, and no weights by their names"),
        (["nothing.pth", *of_model], "it has optimizer"),
        (["damaged.safetensors", *of_model], "damaged.safetensors is damaged"),
        (["nan.safetensors", *of_model], "NaN or infinite"),
        (["nan.safetensors", *synthetic], "give --model NAME"),
        (["nan.safetensors", "--model", "resnet20"], "data.root is missing"),
        (
            ["others.safetensors", *of_model],
            "it lacks 1.bias; the network has no 2.bias; 1.weight has shape (4, 48)",
        ),
        (["nan.safetensors", *of_model, "--at", "theta"], "from which θ is made: give a checkpoint"),
        (["nan.safetensors", *of_model, "--at", "ema"], "no moving average"),
        ([str(run), "--at", "x0"], "invalid choice: 'x0'"),
        ([str(run), "--epochs", "3"], "unrecognized arguments: --epochs 3"),
        ([str(run), "--data.mixup", "0.2"], "unrecognized arguments: --data.mixup"),
        ([str(run), "--data.synthetic_classes", "2"], "the data's classes are not those of"),
        ([str(run), "--resize", "40"], "--resize: for images that Pillow decodes only"),
        (["nan.safetensors", *folder, "--resize", "40"], "smaller than the crop, data.image_size=224"),
        (["nan.safetensors", *folder, "--mean", "0.5", "0.5"], "--mean takes one number, or one for each"),
        (["nan.safetensors", *folder, "--std", "0"], "--std takes one number, or one for each"),
        ([str(run), "--engine", "mine"], "--engine mine is not known"),
    ]:
        assert evaluate_command(arguments) == 2, arguments
        shown = capsys.readouterr().err
        assert said in shown, (arguments, shown)
        assert "Traceback" not in shown
    assert not Path("made").exists()
    weights = max((run / "checkpoints").glob("step-*")) / "manifest.json"
    weights.write_text(weights.read_text().replace("parameter:1.bias", "parameter:1.bios"))
    assert evaluate_command([str(run)]) == 2
    assert "error: " in capsys.readouterr().err


def test_loader_processes_without_room_are_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an evaluation that begins where a training would be refused, or counts batches of a training too."""
    # 2 processes × 2 batches of 3 images of 4 × 4 pixels, 3 bytes each
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 2 * 3 * 3 * 16 - 1))
    assert evaluate_command([str(run), "--data.workers", "2"]) == 2
    error = capsys.readouterr().err
    assert "error: /dev/shm has 0.0 MiB free" in error
    assert "(data.workers=2, 3 images of 4 × 4 in validation): give it more room (docker --shm-size" in error
