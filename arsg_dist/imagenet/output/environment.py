"""Record code revision, package versions and hardware of a run."""

import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

import arsg_dist
from arsg_dist.engine import Engine
from arsg_dist.engine.consistency import PACKAGES, code_digest, installed_version
from arsg_dist.safe_io.files import inside, read_text

_PACKAGES = (*PACKAGES, "timm", "pillow", "safetensors")


def describe(engine: Engine, *, hosts: list[str], data: str, seed: int) -> dict[str, Any]:
    """Describe what a start depends on beside its settings, for YAML.

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
        "git": checkout(Path(arsg_dist.__file__).parents[1]),
        "code": code_digest(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := installed_version(name))},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine() + " CPU",
        "world_size": engine.communicator.world_size,
        "hosts": len(set(hosts)),
        "seed": seed,
        "data": data,
    }


def checkout(root: Path) -> dict[str, Any] | None:
    """Read a checkout's revision from its files: git runs what its settings name.

    Whether files were changed since is not asked; `code_digest` tells one edited checkout from another.

    Args:
        root: top directory of the checkout.

    Returns:
        The revision, or None where `root` is no checkout, or one of a form that is not known here.
    """
    try:
        entry = root / ".git"
        git = entry if entry.is_dir() else root / _line(entry).removeprefix("gitdir: ")
        # What belongs to one of several worktrees is in its own directory, the rest in the common one.
        common = git / _line(git / "commondir") if (git / "commondir").exists() else git
        head = _line(git / "HEAD")
        revision = _value(git, common, head.removeprefix("ref: ")) if head.startswith("ref: ") else head
    except (OSError, ValueError):
        return None
    return {"revision": revision} if _REVISION.fullmatch(revision) else None


_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def _value(git: Path, common: Path, reference: str) -> str:
    """Read the revision that a reference stands for; "" if it has none."""
    for directory in (git, common):
        path = inside(directory, *reference.split("/"))
        if path.exists():
            return _line(path)
    for line in read_text(common / "packed-refs").splitlines():
        revision, _, name = line.partition(" ")
        if name == reference:
            return revision
    return ""


def _line(path: Path) -> str:
    return read_text(path, limit=4096).strip()
