"""All ranks must be about to do the same thing."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import arsg_dist
from arsg_dist.engine.communicator import Communicator, JobError

PACKAGES = ("arsg-dist", "torch", "deepspeed", "horovod", "numpy", "torchvision")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in a training; "not installed" where one is missing."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def code_digest() -> str:
    """A digest of the Python files of this package: versions do not tell one edited checkout from another."""
    root = Path(arsg_dist.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def check_agreement(communicator: Communicator, **values: Any) -> None:
    """Stops every rank if one has another value, instead of training something nobody asked for.

    World size, package versions and the source of this package are always compared. Every rank must call it, with
    the same names.

    Args:
        communicator: of the job.
        values: name → something JSON can write, for example config=..., data=fingerprint, seed=0.

    Raises:
        JobError: on every rank, naming each difference and the ranks that have it.
    """
    compared = {
        "world size": communicator.world_size,
        "version": package_versions(),
        "code of arsg-dist": code_digest(),
        **values,
    }
    flat = _flatten(compared)
    digest = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()
    if len(set(communicator.all_gather_object(digest))) == 1:
        return
    everybody = communicator.all_gather_object(flat)
    differences = []
    for key in sorted({key for one in everybody for key in one}):
        expected = everybody[0].get(key, "nothing")
        ranks_of: dict[str, list[int]] = {}
        for rank, one in enumerate(everybody):
            if one.get(key, "nothing") != expected:
                ranks_of.setdefault(one.get(key, "nothing"), []).append(rank)
        for value, ranks in ranks_of.items():
            listed = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
            differences.append(
                f"the {key} of rank {listed} differs from rank 0's: {_short(value)} and {_short(expected)}"
            )
    raise JobError("\n".join(differences))


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            flat |= _flatten(inner, f"{prefix}{key} ")
        else:
            flat[f"{prefix}{key}"] = json.dumps(inner, sort_keys=True)
    return flat


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
