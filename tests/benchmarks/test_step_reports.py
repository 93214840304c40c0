"""What benchmarks of steps make of their measurements, and that the one of throughput ends."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Benchmarks are scripts: they import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_what_is_hidden_is_what_does_not_show(modules: Any) -> None:
    """Catches a share of the exchange that is negative, above 1, or of the whole step."""
    step = modules("horovod_step")

    def round_of(waited: float) -> dict[str, float]:
        return {"waited, apart": 100.0, "waited, whole": waited}

    assert step.hidden([round_of(25.0), round_of(50.0), round_of(90.0)]) == "50%"
    assert step.hidden([round_of(0.0)]) == "100%"
    assert step.hidden([round_of(120.0)]) == "none"
    assert step.hidden([{"waited, apart": 0.0, "waited, whole": 0.0}]) == "none"


def test_ratios_are_taken_within_a_round(modules: Any) -> None:
    """Catches a ratio of medians: a load on the machine in one round would move it."""
    report = modules("zero_step_report")
    rounds = [{"whole": 10.0}, {"whole": 200.0}, {"whole": 10.0}]
    baseline = [{"whole": 20.0}, {"whole": 100.0}, {"whole": 20.0}]
    assert report.ratio(rounds, baseline, "whole") == 0.5


def test_a_table_grows_by_rows_and_a_row_is_replaced_whole(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ratios between measurements of different runs, and rows that another run's command takes along."""
    kept = modules("kept_results").KeptResults
    monkeypatch.setattr(sys, "argv", ["benchmarks/some_step.py", "--ranks", "2"])
    first = kept(tmp_path / "table.md", {"device": "cpu"})
    first.add({"model/1/2": {"ARSG": [1.0], "Adam": [2.0]}, "model/1/3": {"ARSG": [3.0]}})
    monkeypatch.setattr(sys, "argv", ["benchmarks/some_step.py", "--ranks", "2", "--peers", "ARSG"])
    second = kept(tmp_path / "table.md", {"device": "cpu"})
    second.add({"model/1/2": {"ARSG": [4.0]}})
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["results"] == {"model/1/2": {"ARSG": [4.0]}, "model/1/3": {"ARSG": [3.0]}}
    assert found["commands"] == [
        "python benchmarks/some_step.py --ranks 2",
        "python benchmarks/some_step.py --ranks 2 --peers ARSG",
    ]
    with pytest.raises(SystemExit, match="choose another --output"):
        kept(tmp_path / "table.md", {"device": "cuda"})


def test_throughput_ends_with_fewer_images_than_a_batch(tmp_path: Path) -> None:
    """Catches a loader that is asked for ever for a batch it cannot fill, and a report that lacks a peer."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / "train" / name / "1.jpg")
    output = tmp_path / "report.md"
    options = "--model resnet20 --batch 4 --side 32 --workers 1 --rounds 1 --steps 1 --loading-batches 2"
    command = [
        sys.executable,
        BENCHMARKS / "throughput.py",
        "--images",
        tmp_path / "train",
        "--output",
        output,
    ]
    subprocess.run([*command, *options.split()], check=True, timeout=300, capture_output=True)
    report = output.read_text()
    for row in (
        "arsg-imagenet's loader",
        "torchvision ImageFolder",
        "| synthetic | AdamW(fused)",
        "| from files | ARSG",
    ):
        assert row in report
