"""The benchmark of throughput."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support.launchers import REPOSITORY


def test_throughput_ends_with_fewer_images_than_a_batch(tmp_path: Path) -> None:
    """Catches a loader that is asked for ever for a batch it cannot fill, and a report that lacks a peer."""
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / "train" / name / "1.jpg")
    output = tmp_path / "report.md"
    options = "--model resnet20 --batch 4 --side 32 --workers 1 --rounds 1 --steps 1 --loading-batches 2"
    command = [
        sys.executable,
        "-m",
        "benchmarks.throughput",
        "--images",
        tmp_path / "train",
        "--output",
        output,
    ]
    subprocess.run([*command, *options.split()], check=True, timeout=300, capture_output=True, cwd=REPOSITORY)
    report = output.read_text()
    for row in (
        "arsg-imagenet's loader",
        "torchvision ImageFolder",
        "| synthetic | AdamW(fused)",
        "| from files | ARSG",
    ):
        assert row in report
