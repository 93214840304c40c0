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
