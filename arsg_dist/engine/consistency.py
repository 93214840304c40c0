"""Compare the ranks of a job: what they are about to do, and replicas' bits."""

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import arsg_dist
from arsg_dist.engine.communicator import Communicator
from arsg_dist.engine.job import JobError

PACKAGES = ("arsg-dist", "torch", "deepspeed", "horovod", "numpy", "torchvision")
_CHUNK = 2**16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of packages; "not installed" for none."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = installed_version(package) or "not installed"
    return versions


def installed_version(package: str) -> str:
    """Return the version of an installed package, or ""."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def code_digest() -> str:
    """Digest the package's Python files, which tell edited checkouts apart."""
    root = Path(arsg_dist.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def check_agreement(communicator: Communicator, **values: Any) -> None:
    """Stop every rank if one has another value. Collective.

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


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Compute a number that depends on every bit of a tensor and its place.

    Two tensors that differ in one element never have the same; any other two have with a chance of about 2⁻⁶⁴.

    Args:
        tensor: any shape, dtype and device.

    Returns:
        int64, 0-dim, on the tensor's device; nothing waits for it.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    words = real.detach().contiguous().view(-1).view(_WORDS[real.element_size()])
    # On a CPU as much as a cache holds; on a GPU every chunk is a few launches.
    size = _CHUNK if tensor.is_cpu else 2**8 * _CHUNK
    odd = torch.arange(1, 2 * min(size, max(1, len(words))), 2, device=tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for chunk in torch.split(words, size):  # int64 copies of a whole tensor would take twice its memory
        # Arithmetic modulo 2⁶⁴, in which odd factors lose nothing.
        total = total * 6364136223846793005 + (chunk.long() * odd[: len(chunk)]).sum()
    return total


def fingerprints(tensors: Iterable[Tensor]) -> list[int]:
    """Compute the `fingerprint` of each, waiting for a device once."""
    found = [fingerprint(tensor) for tensor in tensors]
    return [int(number) for number in torch.stack(found).tolist()] if found else []


def check_replicas(
    communicator: Communicator, replicated: Iterator[tuple[str, Tensor]], shards_of_ranks: Sequence[int] = ()
) -> None:
    """Compare tensors bit by bit over the ranks, by fingerprints. Collective.

    Args:
        communicator: of all ranks.
        replicated: name → tensor, the same names in the same order on every rank.
        shards_of_ranks: number of what each rank holds, where only those with the same number hold the same.

    Raises:
        JobError: on every rank, naming the ranks that differ from most others and their tensors. Where no value is
            that of most ranks, as among two, nobody can tell who is right: all are named.
    """
    names, tensors = [], []
    for name, tensor in replicated:
        names.append(name)
        tensors.append(tensor)
    shards: dict[int, dict[int, tuple[int, ...]]] = {}
    for rank, numbers in enumerate(communicator.all_gather_object(fingerprints(tensors))):
        shards.setdefault(shards_of_ranks[rank] if shards_of_ranks else 0, {})[rank] = tuple(numbers)
    for of_rank in shards.values():
        _require_equal(of_rank, names)


def _require_equal(of_rank: Mapping[int, tuple[int, ...]], names: list[str]) -> None:
    most, count = Counter(of_rank.values()).most_common(1)[0]
    if count == len(of_rank):
        return
    if 2 * count > len(of_rank):
        odd = [rank for rank, numbers in of_rank.items() if numbers != most]
        who = f"rank {', '.join(map(str, odd))} differs from the {count} others, which agree"
    else:
        (first, most), *others = of_rank.items()
        odd = [rank for rank, _ in others]
        which = "" if [first, *odd] == list(range(len(of_rank))) else f" {', '.join(map(str, of_rank))}"
        who = f"the {len(of_rank)} ranks{which} differ, and no majority tells which is right"
    differing = [
        name for index, name in enumerate(names) if any(of_rank[rank][index] != most[index] for rank in odd)
    ]
    raise JobError(
        f"ranks that must hold the same weights do not: {who}; in {len(differing)} of {len(names)} tensors: "
        f"{', '.join(differing[:3])}{' ...' if len(differing) > 3 else ''}. Memory, a link or a collective operation "
        "corrupted data, or the ranks' processors round differently. Resume from a checkpoint of before"
    )
