"""Results as JSON lines that only grow, so that a killed study loses the run it was in and nothing else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import device_name

Record = dict[str, Any]
_PACKAGES = ("arsg-dist", "numpy", "pytorch_optimizer", "scipy", "torchao", "bitsandbytes")


@cache
def environment() -> Record:
    """Return the versions and the processor that results depend on."""
    versions = {"torch": torch.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": device_name("cpu"), "versions": versions}


def key(record: Record) -> tuple[Any, ...]:
    """Return what tells one run from another."""
    return tuple(record.get(name) for name in ("kind", "optimizer", "trial", "seed"))


class Ledger:
    """The runs of one task.

    The first line of an environment is {"env": name, ...}; every run names the one that it was made in.

    Args:
        path: of the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.environments: dict[str, Record] = {}
        self.records: dict[tuple[Any, ...], Record] = {}
        whole = path.read_bytes() if path.is_file() else b""
        self._torn = len(whole) - (whole.rfind(b"\n") + 1)
        for line in whole.splitlines()[: -1 if self._torn else None]:
            self._take(json.loads(line))

    def __contains__(self, record: Record) -> bool:
        return key(record) in self.records

    def append(self, record: Record) -> None:
        """Add a run made here, on disk before this returns."""
        here = environment()
        name = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:8]
        if name not in self.environments:
            self._write({"env": name, **here})
        self._write({**record, "env": name})

    def chosen(self, **wanted: Any) -> list[Record]:
        """Return the runs with these values, by trial and seed."""
        found = [r for r in self.records.values() if all(r.get(k) == v for k, v in wanted.items())]
        return sorted(found, key=lambda r: (r.get("trial", 0), r["seed"]))

    def _take(self, line: Record) -> None:
        if "optimizer" in line:
            self.records[key(line)] = line
        else:
            self.environments[line["env"]] = line

    def _write(self, line: Record) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A line that a killed process left without its end is cut off first.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END) - self._torn
            os.ftruncate(descriptor, end)
            os.lseek(descriptor, end, os.SEEK_SET)
            os.write(descriptor, json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._torn = 0
        self._take(line)
