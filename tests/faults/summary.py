"""Prints what `pytest tests/faults --record-detection FILE` recorded: `python -m tests.faults.summary FILE`."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median


def main(path: Path) -> None:
    seconds, lost = defaultdict(list), defaultdict(list)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        key = record["fault"], record["engine"]
        if "seconds" in record:
            seconds[key].append(record["seconds"])
        if "lost_updates" in record:
            lost[key].append(record["lost_updates"])
    print(
        "| fault | engine | times | median s until the last rank ended | longest s |\n|---|---|---|---|---|"
    )
    for (fault, engine), values in sorted(seconds.items()):
        print(f"| {fault} | {engine} | {len(values)} | {median(values):.2f} | {max(values):.2f} |")
    for (fault, engine), values in sorted(lost.items()):
        print(f"{fault}, {engine}: at most {max(values)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
