"""Make a page of a run's results, and fill the column of README that says what ran on a GPU.

    python -m benchmarks.gpu.report DIR         # of the --output of python -m benchmarks.gpu

The column says what passed, what failed, on which device and with which versions; a row of which nothing ran stays.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from benchmarks.common.kept_results import RESULTS
from benchmarks.common.machine import short_name
from benchmarks.gpu.runner import ROOT

Results = list[dict[str, Any]]
_HEADING = "| | tested on CPU ranks | run on a GPU |"


def read(output: Path) -> Results:
    """Return a run's results; a line that was cut off is left out."""
    found = []
    for line in (output / "results.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def machine_of(results: Results) -> dict[str, Any]:
    """Return the last result that says what machine it was.

    Raises:
        SystemExit: there is none.
    """
    found = [result for result in results if result.get("kind") == "machine"]
    if not found:
        raise SystemExit("the results do not say which machine they are of: run the stage 'versions'")
    return found[-1]


def last_tasks(results: Results) -> Results:
    """Return how each task ended, the last time that it ran, in the order of the runs."""
    tasks: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        if "outcome" in result:
            tasks.pop((result["stage"], result["task"]), None)
            tasks[result["stage"], result["task"]] = result
    return list(tasks.values())


def page(results: Results, reports: list[str]) -> str:
    """Return the page in Markdown."""
    machine = machine_of(results)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# What was run on {machine['device']}",
        "",
        f"- versions: {versions}",
        f"- revision: {machine['revision'] or 'unknown'}",
        "- command: `python -m benchmarks.gpu`, whose stages these are",
        "",
        "| stage | task | outcome | s | tests | command |",
        "|---|---|---|---|---|---|",
    ]
    for task in last_tasks(results):
        tests = task.get("tests", {})
        counts = ", ".join(f"{count} {name.lower()}" for name, count in tests.items() if name != "failed")
        command = shlex.join(
            ["python", *task["command"][1:]] if "python" in task["command"][0] else task["command"]
        )
        cells = [task["stage"], task["task"], task["outcome"], str(task["seconds"]), counts, f"`{command}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    failed = [name for task in last_tasks(results) for name in task.get("tests", {}).get("failed", [])]
    if failed:
        lines += ["", "Tests that failed:", "", *(f"- `{name}`" for name in failed)]
    kinds: dict[str, Results] = {}
    for result in results:
        if "kind" in result and result["kind"] != "machine":
            kinds.setdefault(result["kind"], []).append(result)
    for kind, found in kinds.items():
        names = list(
            dict.fromkeys(
                name for result in found for name in result if name not in ("kind", "stage", "task")
            )
        )
        lines += ["", f"## {kind}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += ["| " + " | ".join(_cell(result.get(name, "")) for name in names) + " |" for result in found]
    if reports:
        lines += ["", "## Reports", "", *(f"- [{name}]({name})" for name in reports)]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def column(readme: str, results: Results, link: str) -> str:
    """Return README with the column filled.

    Args:
        readme: the text.
        results: of a run on a GPU.
        link: to the page, from README.

    Raises:
        SystemExit: the run was a rehearsal, or README has no such table or row.
    """
    machine = machine_of(results)
    if machine["on"] != "cuda":
        raise SystemExit("a rehearsal on the CPU says nothing about a GPU: README is left as it is")
    said: dict[str, list[str]] = {}
    for task in last_tasks(results):
        ran = task["outcome"] != "no time left" and not task["outcome"].startswith("left out")
        for row, what in task.get("shows", {}).items():
            if ran:
                said.setdefault(row, []).append(
                    what if task["outcome"] == "passed" else f"**failed**: {what}"
                )
    versions = machine["versions"]
    where = f"{machine['device']}, torch {versions['torch']}" + (
        f", CUDA {versions['CUDA']}" if "CUDA" in versions else ""
    )
    before, heading, table = readme.partition(_HEADING)
    if not heading:
        raise SystemExit(f"README.md has no table that begins with {_HEADING}")
    lines = table.split("\n")
    for row, whats in said.items():
        places = [place for place, line in enumerate(lines) if line.startswith(f"| {row}")]
        if len(places) != 1:
            raise SystemExit(f"README.md has {len(places)} rows that begin with {row!r}")
        rest = re.match(r"(.*\|)[^|]*\|\s*$", lines[places[0]])
        assert rest is not None
        lines[places[0]] = f"{rest[1]} {'; '.join(whats)} ({where}; [results]({link})) |"
    return before + heading + "\n".join(lines)


def main() -> None:
    """Read the command line, and write."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.report", description=__doc__, formatter_class=shape
    )
    parser.add_argument("output", type=Path, help="of the run")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu", help="folder of the page")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    results = read(arguments.output)
    name = short_name(machine_of(results)["device"])
    arguments.results.mkdir(parents=True, exist_ok=True)
    reports = []
    for report in sorted(arguments.output.glob("*.md")):
        reports.append(f"{name}_{report.name}")
        shutil.copy(report, arguments.results / reports[-1])
    target = arguments.results / f"{name}.md"
    target.write_text(page(results, reports))
    print(f"written to {target}")
    link = target.resolve().relative_to(arguments.readme.resolve().parent)
    arguments.readme.write_text(column(arguments.readme.read_text(), results, str(link)))


if __name__ == "__main__":
    main()
