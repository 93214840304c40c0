"""The campaign's table, `RESULTS.md`, which is also what an interrupted campaign is resumed from."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.tables import Mutation

RESULTS = Path(__file__).parent / "RESULTS.md"

SEEN, UNSEEN, HUNG, NO_TEST, STALE = "seen", "unseen", "hung", "no test ran", "stale"
BROKEN = "fails without it"
_ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]*) \|")


@dataclass(frozen=True)
class Result:
    """What became of one mistake.

    Attributes:
        outcome: `SEEN`, `UNSEEN`, `HUNG`, `NO_TEST` (with it the tests cannot even start), `STALE` or `BROKEN` (the
            test that saw it fails without the mistake as well).
        by: the first test that failed, or why none could.
    """

    outcome: str
    by: str = ""


def read(path: Path = RESULTS) -> dict[str, Result]:
    """Name → result of the rows that are there."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [match for line in lines if (match := _ROW.match(line))]
    return {row[1]: Result(row[2].strip(), row[3].strip().strip("`")) for row in rows}


def write(results: dict[str, Result], mutations: list[Mutation], path: Path = RESULTS) -> None:
    """Writes the table; results of entries that are no more are dropped."""
    done = [mutation for mutation in mutations if mutation.name in results]
    seen = sum(results[mutation.name].outcome == SEEN for mutation in done)
    untried = [mutation for mutation in mutations if mutation.name not in results]
    lines = [
        "# Which plausible mistakes the tests see",
        "",
        f"Written by `python -m tests.mutation`. Of {len(mutations)} mistakes **{len(done)} were tried and {seen} of "
        f"these seen**{f' ({seen / len(done):.1%})' if done else ''}.",
        "",
        "| mistake | result | by | what goes wrong |",
        "|---|---|---|---|",
    ]
    for mutation in done:
        result = results[mutation.name]
        by = f"`{result.by}`" if result.outcome == SEEN else result.by
        lines.append(f"| `{mutation.name}` | {result.outcome} | {by} | {mutation.says} |")
    unseen = [mutation for mutation in done if results[mutation.name].outcome == UNSEEN]
    if unseen:
        lines += ["", "## Not seen", ""]
        lines += [f"- `{m.name}`: {m.unseen or 'a test is missing'}" for m in unseen]
    if untried:
        lines += ["", "## Not tried yet", ""]
        lines += [f"- `{m.name}`" for m in untried]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)
