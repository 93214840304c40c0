"""Run the fast part of the DeepSpeed tests with other versions of DeepSpeed, and write down what came of it.

    python -m tests.deepspeed.versions 0.18.0 0.19.8           # tests, and the table in docs/deepspeed.md
    python -m tests.deepspeed.versions --resume 0.18.0 0.19.8  # goes on with what has no result yet
    python -m tests.deepspeed.versions --renew 0.19.9          # first takes its methods among the known ones

A run forgets what earlier ones said of its versions; with `--resume` it keeps that. Each version is installed in a
folder below .cache, without its compiled operators, and put before the environment's own on PYTHONPATH. `--renew` adds
the digests of the methods that the repairs wrap or rely on to arsg_dist/deepspeed/known_sources.py: with a version
whose tests pass, or after a look at what it changed in them.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from packaging.version import Version

from arsg_dist.deepspeed.known_sources import KNOWN_SOURCES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".cache/deepspeed"
RESULTS = Path(__file__).with_name("versions.json")
SOURCES = ROOT / "arsg_dist/deepspeed/known_sources.py"
DOCUMENT = ROOT / "docs/deepspeed.md"
BEGIN, END = "<!-- versions: by python -m tests.deepspeed.versions -->\n", "<!-- end of versions -->\n"
PARTS = {
    "repairs": ["tests/deepspeed/test_patches.py", "-k", "not table_of_versions"],
    "defects, shown and repaired": ["tests/deepspeed/test_defects.py"],
    "three ranks, stages 0 to 3": [
        "tests/deepspeed/test_interfaces.py",
        "-k",
        "every_way or functions or within_reach or state_that",
    ],
    "engines of one rank": ["tests/deepspeed/test_one_rank.py"],
    "checks between updates": ["tests/deepspeed/test_update_checks.py"],
    "loads": ["tests/deepspeed/test_loads.py", "-m", "not slow"],
}
DATE = "run on"
_PRINT = "import json, arsg_dist.deepspeed.patching as p, arsg_dist.deepspeed; print(json.dumps(p.sources()))"


def environment(version: str) -> dict[str, str]:
    """Install a version, unless it is there; return the environment variables that put it first."""
    folder = FOLDER / version
    if not (folder / "complete").exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run(
            [*install, "--upgrade", "--target", str(folder), f"deepspeed=={version}"],
            env={**os.environ, "DS_BUILD_OPS": "0"},
            check=True,
        )
        # Else each would compile its operator for CPU ranks, for minutes, at the start of the first job.
        with (folder / "deepspeed/comm/torch.py").open("a") as file:
            file.write("\n\ndef build_shm_op():\n    return None\n")
        (folder / "complete").touch()
    return {
        **os.environ,
        "PYTHONPATH": f"{folder}:{ROOT}",
        "DS_ACCELERATOR": "cpu",
        "ARSG_TESTED_DEEPSPEED": version,  # which ranks compare with what they import
    }


def sources(version: str) -> dict[str, str]:
    """The digests of a version's methods."""
    found = subprocess.run(
        [sys.executable, "-c", _PRINT],
        env=environment(version),
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    listed: dict[str, str] = json.loads(found.stdout.splitlines()[-1])
    return listed


def renewed(
    known: dict[str, dict[str, str]], version: str, found: dict[str, str]
) -> dict[str, dict[str, str]]:
    """The known digests with those of a version; each says the first and the last version that has it."""
    known = {name: dict(digests) for name, digests in known.items()}
    for name, digest in found.items():
        digests = known.setdefault(name, {})
        versions = [Version(one) for one in digests.get(digest, version).split(" to ")] + [Version(version)]
        first, last = min(versions), max(versions)
        digests[digest] = str(first) if first == last else f"{first} to {last}"
    return known


def text_of(known: dict[str, dict[str, str]]) -> str:
    """The module that holds the digests."""
    lines = [
        '"""Know the methods of DeepSpeed that repairs depend on: digests of their texts, which versions have them.',
        "",
        "Written by `python -m tests.deepspeed.versions --renew VERSION`.",
        '"""',
        "",
        "from typing import Final",
        "",
        "KNOWN_SOURCES: Final[dict[str, dict[str, str]]] = {",
    ]
    for name in sorted(known):
        lines.append(f'    "{name}": {{')
        by_version = sorted(known[name].items(), key=lambda item: Version(item[1].split(" to ")[0]))
        lines += [f'        "{digest}": "{versions}",' for digest, versions in by_version]
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def outcome(version: str, arguments: list[str]) -> str:
    """Run tests with a version; say how many passed."""
    report = FOLDER / f"{version}.xml"
    report.unlink(missing_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments],
        env=environment(version),
        cwd=ROOT,
    )
    if not report.exists():
        return "**ended before its tests did**"
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped, failed = (int(suite.get(key, 0)) for key in ("tests", "skipped", "failures"))
    failed += int(suite.get("errors", 0))
    said = f"{total - skipped - failed} passed"
    return said + (f", **{failed} failed**" if failed else "") + (f", {skipped} skipped" if skipped else "")


def table(results: dict[str, dict[str, str]]) -> str:
    """The table of docs/deepspeed.md."""
    columns = [*PARTS, DATE]
    lines = [f"| DeepSpeed | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for version in sorted(results, key=Version):
        lines.append(f"| {version} | {' | '.join(results[version].get(key, 'not run') for key in columns)} |")
    return "\n".join(lines) + "\n"


def write(results: dict[str, dict[str, str]]) -> None:
    """Keep the results, and put them into the document."""
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table(results) + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--renew", action="store_true", help="take its methods among the known ones")
    parser.add_argument("--resume", action="store_true", help="leave out what has a result")
    arguments = parser.parse_args()
    if arguments.renew:
        known = KNOWN_SOURCES
        for version in arguments.versions:
            known = renewed(known, version, sources(version))
        SOURCES.write_text(text_of(known))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for version in arguments.versions:
        if not arguments.resume:
            results[version] = {}
    write(results)
    for version in arguments.versions:
        for part, tests in PARTS.items():
            if part in results.setdefault(version, {}):
                continue
            said = outcome(version, tests)
            results[version] |= {part: said, DATE: datetime.date.today().isoformat()}
            write(results)


if __name__ == "__main__":
    main()
