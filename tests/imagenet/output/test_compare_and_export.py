"""What can be seen of runs and taken from them: records, comparison, weights, model card."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from arsg_dist.imagenet import formats
from arsg_dist.imagenet.cli import compare_command, export_command, train_command
from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.dataset import open_splits
from arsg_dist.imagenet.data.transforms import normalised
from arsg_dist.imagenet.torchvision_compat import torchvision
from arsg_dist.imagenet.training.progress import Progress
from tests.imagenet.test_training import epochs_of
from tests.support.launchers import REPOSITORY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A finished run of two epochs with an average of the weights."""
    root = tmp_path_factory.mktemp("run")
    for split, count in (("train", 8), ("val", 5)):
        for digit in "03":
            target = root / "tree" / split / digit
            target.mkdir(parents=True)
            for path in sorted((digits / split / digit).iterdir())[:count]:
                shutil.copy(path, target)
    recipe = root / "recipe.yaml"
    recipe.write_text(
        f"data: {{root: {root / 'tree'}, augmentation: none, image_size: 32, workers: 0}}\n"
        "model: resnet18\nepochs: 2\nbatch_size: 8\nema_decay: 0.5\nprecision: bf16\nchannels_last: true\n"
        "optimizer: {type: ARSG, params: {lr: 0.001, mu: 0.1}}\nlog_every: 1\n"
    )
    code = train_command(["--config", str(recipe), "--output", str(root / "one")])
    assert code == 0
    return root / "one"


def assert_the_code_runs(card: str, directory: Path) -> None:
    """In a process of its own: here torchvision has been imported already, however that came."""
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", f"{code}\nprint(len(model.state_dict()))"]
    shown = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert (shown.returncode, shown.stdout.strip()) == (0, "122"), shown.stderr


@pytest.mark.parametrize("weights", ["best", "last", "ema"])
def test_exported_weights_load_in_plain_torchvision_and_score_as_the_card_says(
    weights: str, run: Path, tmp_path: Path
) -> None:
    """Catches names or layouts another program cannot load, a card with another file's accuracy, and code in it that
    does not run, as beside a torch without CUDA."""
    output = tmp_path / "export"
    assert export_command([str(run), "--output", str(output), "--weights", weights]) == 0
    state = load_file(output / "model.safetensors")
    model = torchvision.models.resnet18(num_classes=2)
    model.load_state_dict(state)
    record = epochs_of(run)[-1]
    card = (output / "README.md").read_text()
    if weights != "best":
        key = "ema_val_top1" if weights == "ema" else "val_top1"
        assert f"{record[key]:.2%}" in card
    assert "images/s" in card
    assert "torchvision.models.resnet18(num_classes=2)" in card
    if weights == "best":
        assert_the_code_runs(card, output)
    assert "seed 0" in card
    assert (output / "classes.txt").read_text().split() == ["0", "3"]
    _, val = open_splits(run.parent / "tree", DataConfig(image_size=32, augmentation="none"), seed=0)
    images = torch.stack([val[(0, index)][0] for index in range(len(val))])
    labels = torch.tensor([0] * 5 + [1] * 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.eval()(normalised(images).to(memory_format=torch.channels_last)).float()
    assert f"{(logits.argmax(dim=1) == labels).float().mean().item():.2%}" in card
    if weights != "best":
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert loss == pytest.approx(record["ema_val_loss" if weights == "ema" else "val_loss"], rel=1e-3)


def test_export_refuses_what_it_cannot_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, or files written over somebody's directory."""
    assert export_command([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert export_command([str(run), "--output", str(tmp_path / "mine")]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare)
    assert export_command([str(bare), "--output", str(tmp_path / "out")]) == 2
    assert "no weights yet" in capsys.readouterr().err


def test_runs_are_compared_in_a_table_and_a_picture(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a comparison that mixes up runs, or compares different data without a word."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    starts = yaml.safe_load((other / "environment.yaml").read_text())
    starts[-1]["data"] = "something else"
    (other / "environment.yaml").write_text(yaml.safe_dump(starts))
    records = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "epoch":
            record["val_top1"] = 0.25 * record["epoch"]
    (other / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    picture = tmp_path / "comparison.png"
    assert compare_command([str(run), str(other), "--output", str(picture)]) == 0
    shown = capsys.readouterr()
    row = next(line for line in shown.out.splitlines() if line.startswith("| other "))
    assert "50.00% (2)" in row
    assert "ARSG lr 0.001, mu 0.1" in row
    assert "other was trained on other data than one" in shown.err
    assert picture.stat().st_size > 20_000
    (other / "metrics.jsonl").write_text("")
    assert compare_command([str(run), str(other), "--output", str(picture)]) == 2
    assert f"{other} has no finished epoch" in capsys.readouterr().err


def test_a_run_says_with_what_it_was_made(run: Path) -> None:
    """Catches a run that cannot be made again: code, packages, seed or machine missing."""
    start = yaml.safe_load((run / "environment.yaml").read_text())[-1]
    assert start["packages"]["torch"] == torch.__version__
    assert len(start["git"]["revision"]) == 40
    assert (start["seed"], start["world_size"], start["hosts"]) == (0, 1, 1)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    assert len(train) == 4
    assert all(0 <= record["data_wait_share"] <= 1 for record in train)
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["seed"], config["precision"]) == (0, "bf16")


def test_print_config_shows_the_resolved_settings_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a flag that trains, or that shows other settings than a run would use."""
    arguments = [
        "--config",
        "configs/imagenet_short.yaml",
        "--epochs",
        "20",
        "--output",
        str(tmp_path / "run"),
    ]
    assert train_command([*arguments, "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["epochs"], shown["data"]["progressive"]["start_size"]) == (20, 128)
    assert not (tmp_path / "run").exists()


def test_the_bar_shows_what_is_promised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a field of the bar that is lost or shows another's value; other ranks must show nothing."""
    monkeypatch.delenv("COLUMNS", raising=False)  # which would cut the bar off
    clock = [100.0]
    monkeypatch.setattr("arsg_dist.imagenet.training.progress.time.perf_counter", lambda: clock[0])
    for rank in (1, 0):
        assert not capsys.readouterr().err
        progress = Progress(None, rank=rank, world_size=2, total_updates=20, first_update=10, batch_size=8)
        progress.begin_epoch("epoch 1/3", 4)
        for _ in range(2):
            clock[0] += 4.0
            progress.updated()
        progress.record(12, 1.25, {"lr": 0.015, "mu": 0.1}, [0.25, 0.5])
    shown = capsys.readouterr().err
    fields = "loss=1.250, lr=0.015, mu=0.1, per rank=1/s, data wait=50%, run ends in=00:32"
    assert re.search(r"epoch 1/3: .* 16/32 .* [\d.k]+ images/s, " + re.escape(fields), shown), shown


def test_progress_measures_waiting_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a share or speed of the wrong stretch, and an estimate that forgets the updates before a resume."""
    clock = [100.0]
    monkeypatch.setattr("arsg_dist.imagenet.training.progress.time.perf_counter", lambda: clock[0])

    def slow_batches() -> object:
        for _ in range(4):
            clock[0] += 1.0
            yield None

    progress = Progress(None, rank=1, world_size=2, total_updates=20, first_update=10, batch_size=8)
    progress.begin_epoch("epoch 1/1", 4)
    for done, _ in enumerate(progress.waiting(slow_batches()), start=1):  # type: ignore[arg-type]
        clock[0] += 3.0
        progress.updated()
        if done == 2:
            assert progress.waited_share() == 0.25
            progress.record(12, 1.0, {"lr": 0.1}, [0.25, 0.5])
    assert progress.seconds_left(14) == 6 * 4.0
    speed = progress.end_epoch()
    assert speed == {"images_per_second": 2.0, "images_per_second_per_rank": 1.0, "data_wait_share": 0.25}


@pytest.fixture(scope="module")
def right_logits(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and what torchvision's network computes from the run's last weights."""
    model = torchvision.models.resnet18(num_classes=2).eval()
    model.load_state_dict(load_file(run / "weights" / "last.safetensors"))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return images, model(images)


def exported(run: Path, output: Path, format_: str) -> Path:
    assert export_command([str(run), "--output", str(output), "--weights", "last", "--format", format_]) == 0
    return output


def test_an_export_for_torchvision_is_a_state_dict(
    run: Path, right_logits: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    """Catches a file that torch loads only with its code, and other weights than those asked for."""
    state = torch.load(exported(run, tmp_path / "out", "torchvision") / "model.pth", weights_only=True)
    model = torchvision.models.get_model("resnet18", num_classes=2).eval()
    model.load_state_dict(state)
    images, right = right_logits
    with torch.no_grad():
        torch.testing.assert_close(model(images), right, rtol=0, atol=0)
    assert 'torch.load("model.pth", weights_only=True)' in (tmp_path / "out" / "README.md").read_text()


def test_an_export_for_timm_is_a_directory_that_it_loads(
    run: Path, right_logits: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    """Catches a config that timm cannot read, or with another number of classes, names or preprocessing."""
    timm = pytest.importorskip("timm")
    output = exported(run, tmp_path / "out", "timm")
    model = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    images, right = right_logits
    with torch.no_grad():
        torch.testing.assert_close(model(images), right, rtol=1e-5, atol=1e-5)
    assert model.pretrained_cfg["label_names"] == ["0", "3"]
    how = timm.data.resolve_data_config({}, model=model)
    assert (tuple(how["input_size"]), how["crop_pct"]) == ((3, 32, 32), 1.0)
    assert tuple(how["mean"]) == (0.485, 0.456, 0.406)
    assert how["interpolation"] == "bilinear"


def test_timm_crops_as_the_run_did(tmp_path: Path) -> None:
    """Catches a network that was validated on the middle of larger images and is given them whole."""
    pytest.importorskip("timm")
    module = torchvision.models.resnet18(num_classes=2).eval()
    source = formats._Source("resnet18", module, ["a", "b"], 56, cropped=True)
    (extra,) = formats._timm(source)
    extra.write(tmp_path / "config.json")
    how = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert (how["crop_mode"], how["crop_pct"]) == ("center", 56 / 64)


def test_an_export_to_onnx_computes_the_same_for_any_number_of_images(
    run: Path, right_logits: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    """Catches a file with a number of images built in, batch norm as in training, or weights beside it that get
    lost."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    output = exported(run, tmp_path / "out", "onnx")
    assert sorted(path.name for path in output.iterdir()) == [
        "README.md",
        "classes.txt",
        "config.yaml",
        "model.onnx",
        "model.safetensors",
    ]
    session = onnxruntime.InferenceSession(str(output / "model.onnx"))
    images, right = right_logits
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), right, rtol=1e-4, atol=1e-4)


class Nan(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * torch.nan


def test_a_format_that_cannot_be_is_refused_and_nothing_is_made(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a file that another program loads and computes something else with, and half an export."""
    command = [str(run), "--output", str(tmp_path / "out"), "--format"]
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    assert export_command([*command, "onnx"]) == 2
    assert "needs onnx, onnxscript, onnxruntime: pip install 'arsg-dist[onnx]'" in capsys.readouterr().err
    real = formats.build_model

    def other(name: str, num_classes: int) -> torch.nn.Module:
        model = real(name.removeprefix("timm:"), num_classes)
        if name.startswith("timm:"):  # the same tensors, but another network
            model.maxpool = torch.nn.Identity()
        return model

    monkeypatch.setattr(formats, "build_model", other)
    assert export_command([*command, "timm"]) == 2
    assert "timm's resnet18 computes other logits" in capsys.readouterr().err
    monkeypatch.setattr(torch.nn, "Identity", Nan)
    assert export_command([*command, "timm"]) == 2
    assert "timm's resnet18 computes other logits" in capsys.readouterr().err
    deeper = {"timm:resnet18": "resnet34"}
    monkeypatch.setattr(formats, "build_model", lambda name, classes: real(deeper.get(name, name), classes))
    assert export_command([*command, "timm"]) == 2
    assert "with other tensors than resnet18" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
