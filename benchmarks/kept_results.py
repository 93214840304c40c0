"""Measurements for one table that several runs of a benchmark make, kept in a JSON file beside it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any


class KeptResults:
    """What was measured so far for a table, and by which commands.

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
        self.table, self.settings = table, settings
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
        """Takes over rows of this run; one that was there is replaced whole, since ratios are taken within a run."""
        self.results |= new
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        self.commands = [kept for kept in self.commands if kept != command] + [command]
        kept = {"settings": self.settings, "commands": self.commands, "results": self.results}
        self._file.write_text(json.dumps(kept, indent=1) + "\n")

    def write_table(self, lines: list[str]) -> None:
        """Writes the table, and prints it."""
        text = "\n".join(lines).rstrip() + "\n"
        self.table.write_text(text)
        print(text, f"\nwritten to {self.table}", sep="")
