"""Say what machine this is, and how fast its memory is copied."""

from __future__ import annotations

import argparse
import platform
import subprocess
from importlib import metadata

import torch

from benchmarks.common.machine import device_ms, device_name
from benchmarks.gpu.runner import ROOT, say

PACKAGES = (
    "torch",
    "triton",
    "torchvision",
    "numpy",
    "deepspeed",
    "horovod",
    "timm",
    "pytest",
    "nvidia-nccl-cu13",
)


def main() -> None:
    """Print results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    if torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
    revision = said("git", "rev-parse", "--short", "HEAD")
    name = device_name(device)
    say(kind="machine", device=name, on=device, versions=versions, revision=revision)
    if device == "cuda":
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        say(
            kind="clocks",
            **dict(
                zip(
                    fields.split(","),
                    said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").split(", "),
                    strict=False,
                )
            ),
        )
    for megabytes in (8,) if device == "cpu" else (100, 1_000, 8_000):
        source = torch.ones(megabytes * 250_000, device=device)
        target = torch.empty_like(source)
        times = [device_ms(lambda: target.copy_(source), device) for _ in range(8)]  # noqa: B023
        say(kind="copy", megabytes=megabytes, gigabytes_per_second=round(2 * megabytes / min(times), 1))


def said(*command: str) -> str:
    """Return what a command prints, "" where it cannot."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    main()
