"""With what was a run made: code, packages, machine."""

import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from arsg_dist.engine import Engine

_PACKAGES = (
    "arsg-dist",
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "horovod",
    "numpy",
    "pillow",
    "safetensors",
)


def describe(engine: Engine, *, hosts: list[str], data: str, seed: int) -> dict[str, Any]:
    """What a start of a run depends on beside its settings, as plain values for YAML.

    Args:
        engine: of the run.
        hosts: the host of every rank.
        data: fingerprint of the data.
        seed: of the run.
    """
    device = engine.device
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(sys.argv),
        "git": _git(Path.cwd()),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine() + " CPU",
        "world_size": engine.communicator.world_size,
        "hosts": len(set(hosts)),
        "seed": seed,
        "data": data,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(directory: Path) -> dict[str, Any] | None:
    """Revision of the checkout that `directory` is in, and whether it has changes; None outside of one."""
    try:
        revision, status = (
            subprocess.run(
                ["git", "-C", str(directory), *arguments],
                capture_output=True,
                text=True,
                check=True,
                timeout=30,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "changed": bool(status)}
