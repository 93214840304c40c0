"""Results of benchmarks: in which file they are kept, and by which command they were measured."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common.machine import device_name, short_name

RESULTS = Path(__file__).parents[1] / "results"


def machine_results(device: str) -> Path:
    """Return benchmarks/results/MACHINE, named after the processor, or after the GPU for "cuda"."""
    return RESULTS / short_name(device_name(device))


def this_command() -> str:
    """Return the command line that measures the same again, without what launched it."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def median_ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """Return the median over rounds of the ratios within a round, which a load on the machine moves alike."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def write_report(path: Path, text: str) -> None:
    """Write a report, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text, f"\nwritten to {path}", sep="")


class KeptResults:
    """Measurements for one table that several runs of a benchmark make, kept in a JSON file beside it.

    Args:
        table: the Markdown file; the JSON file lies beside it.
        settings: what all measurements of the table have in common.

    Attributes:
        results: row name → what was measured for each peer.
        commands: that measured them.

    Raises:
        SystemExit: the file holds measurements with other settings.
    """

    def __init__(self, table: Path, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.results: dict[str, dict[str, Any]] = {}
        self.commands: list[str] = []
        self._file = table.with_suffix(".json")
        if self._file.exists():
            kept = json.loads(self._file.read_text())
            if kept["settings"] != settings:
                sys.exit(
                    f"{self._file} was measured with {kept['settings']}: choose another --output, or remove it"
                )
            self.results, self.commands = kept["results"], kept["commands"]

    def add(self, new: dict[str, dict[str, Any]]) -> None:
        """Take over rows of this run; one that was there is replaced whole, since ratios are taken within a run."""
        self.results |= new
        command = this_command()
        self.commands = [kept for kept in self.commands if kept != command] + [command]
        kept = {"settings": self.settings, "commands": self.commands, "results": self.results}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(kept, indent=1) + "\n")
