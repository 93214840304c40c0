"""What benchmarks of steps make of their measurements, and that the one of throughput ends."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks.common.kept_results import RESULTS, KeptResults
from benchmarks.common.machine import short_name
from benchmarks.step import on_torch
from benchmarks.step.__main__ import ENGINES
from benchmarks.step.deepspeed import DeepSpeed, engine_config
from benchmarks.step.driver import default_ranks, report_of
from benchmarks.step.engine import ratio
from benchmarks.step.horovod import hidden
from tests.support.launchers import REPOSITORY


def test_what_is_hidden_is_what_does_not_show() -> None:
    """Catches a share of the exchange that is negative, above 1, or of the whole step."""
    for waited, shown in (([25.0, 50.0, 90.0], "50%"), ([0.0], "100%"), ([120.0], "none")):
        assert hidden([{"waited, apart": 100.0, "waited, whole": each} for each in waited]) == shown
    assert hidden([{"waited, apart": 0.0, "waited, whole": 0.0}]) == "none"


def test_on_torch_alone_the_exchange_is_what_a_step_takes_beyond_passes_and_optimizer() -> None:
    """Catches the optimizer's time, which a divided update saves, counted as exchange; and a gather not counted."""
    each = {"whole": 100.0, "compute": 60.0, "own": 10.0, "alone": 40.0}
    assert on_torch.hidden([each]) == "25%"
    assert on_torch.hidden([{**each, "whole": 130.0}]) == "none"
    assert on_torch.hidden([{**each, "whole": 50.0}]) == "100%"
    sent = [on_torch.wire_bytes(kind, on_torch.SMALL, 4) for kind in ("ddp", "divided", "ZeRO", "fsdp")]
    assert sent[0] == sent[1] == 2 * 4 * 25_909_632 * 3 / 4
    assert sent[2] == sent[3] == 1.5 * sent[0]
    assert {*on_torch.OnTorch.exchanged} == {*on_torch.OnTorch.peers}


def test_ratios_are_taken_within_a_round() -> None:
    """Catches a ratio of medians: a load on the machine in one round would move it."""
    rounds = [{"whole": 10.0}, {"whole": 200.0}, {"whole": 10.0}]
    baseline = [{"whole": 20.0}, {"whole": 100.0}, {"whole": 20.0}]
    assert ratio(rounds, baseline, "whole") == 0.5


def test_a_table_grows_by_rows_and_a_row_is_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ratios between measurements of different runs, and rows that another run's command takes along."""
    command = ["python3", "-m", "benchmarks.step", "deepspeed", "--ranks", "2"]
    monkeypatch.setattr(sys, "orig_argv", command)
    first = KeptResults(tmp_path / "table.md", {"device": "cpu"})
    first.add({"model/1/2": {"ARSG": [1.0], "Adam": [2.0]}, "model/1/3": {"ARSG": [3.0]}})
    monkeypatch.setattr(sys, "orig_argv", [*command, "--peers", "ARSG"])
    second = KeptResults(tmp_path / "table.md", {"device": "cpu"})
    second.add({"model/1/2": {"ARSG": [4.0]}})
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["results"] == {"model/1/2": {"ARSG": [4.0]}, "model/1/3": {"ARSG": [3.0]}}
    assert found["commands"] == [
        "python -m benchmarks.step deepspeed --ranks 2",
        "python -m benchmarks.step deepspeed --ranks 2 --peers ARSG",
    ]
    with pytest.raises(SystemExit, match="choose another --output"):
        KeptResults(tmp_path / "table.md", {"device": "cuda"})


@pytest.mark.parametrize("path", [*RESULTS.glob("*/step/*.json")], ids=lambda path: path.stem)
def test_published_tables_are_those_of_their_measurements(path: Path) -> None:
    """Catches a table that was edited, results in another machine's folder, and a change of the tables' numbers."""
    kept = KeptResults(path, json.loads(path.read_text())["settings"])
    assert report_of(ENGINES[path.stem.partition("_")[0]](), kept) == path.with_suffix(".md").read_text()
    assert short_name(kept.settings["machine"]) == path.parts[-3]


def test_there_is_a_gpu_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that share a GPU unasked, whose times say nothing."""
    assert default_ranks("cpu") == [1, 2, 3, 4]
    for gpus, ranks in ((1, [1]), (3, [1, 2, 3]), (8, [1, 2, 3, 4])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert default_ranks("cuda") == ranks
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match="no CUDA device"):
        default_ranks("cuda")


@pytest.mark.parametrize(
    ("device", "built", "torchs"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_deepspeeds_adam_is_torchs_where_it_would_have_to_be_compiled_first(
    device: str, built: bool, torchs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a benchmark that compiles for minutes on a GPU machine, or ends where there is no compiler."""
    for name in ("deepspeed", "deepspeed.git_version_info"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(installed_ops={"fused_adam": built}))
    arguments = Namespace(device=device, batch=1, precision="fp32", offload=False)
    adam = engine_config(DeepSpeed.baseline, 1, arguments)["optimizer"]
    assert adam == {"type": "Adam", "params": {"lr": 1e-6, "torch_adam": torchs}}


@pytest.mark.turn(1)
def test_throughput_ends_with_fewer_images_than_a_batch(tmp_path: Path) -> None:
    """Catches a loader that is asked for ever for a batch it cannot fill, and a report that lacks a peer."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / "train" / name / "1.jpg")
    output = tmp_path / "report.md"
    options = "--model resnet20 --batch 4 --side 32 --workers 1 --rounds 1 --steps 1 --loading-batches 2"
    command = [sys.executable, "-m", "benchmarks.throughput", "--images", tmp_path / "train"]
    command += ["--output", output, *options.split()]
    subprocess.run(command, check=True, timeout=300, capture_output=True, cwd=REPOSITORY)
    report = output.read_text()
    for row in (
        "arsg-imagenet's loader",
        "torchvision ImageFolder",
        "| synthetic | AdamW(fused)",
        "| from files | ARSG",
    ):
        assert row in report
