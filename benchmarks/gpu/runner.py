"""Run stages one after another, and write down what comes of them as it comes."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.stages import Stage, Task

ROOT = Path(__file__).parents[2]
RESULT = "RESULT "
_TEST = re.compile(r"(?:\[gw\d+\]\s.*)?\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
_GIVEN = re.compile(rf"(?:\[\d+\]<std\w+>:)?{RESULT}(.*)")  # horovodrun puts the rank in front
_GRACE = 5.0
_PR_SET_CHILD_SUBREAPER = 36


class Record:
    """The results, one line of JSON each, and one log; every line is on its way to the disk when it is written.

    Args:
        output: an existing folder; results of a run before are kept.
    """

    def __init__(self, output: Path) -> None:
        self._results = (output / "results.jsonl").open("a", buffering=1)
        self._log = (output / "log.txt").open("a", buffering=1)

    def result(self, **values: Any) -> None:
        """Write a result."""
        self._results.write(json.dumps(values) + "\n")
        self._results.flush()

    def line(self, text: str) -> None:
        """Write a line to the log, and show it."""
        self._log.write(text + "\n")
        self._log.flush()
        print(text, flush=True)


def run_stages(
    found: Iterable[Stage],
    record: Record,
    environment: dict[str, str],
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Run stages; whatever fails, the next is run.

    Args:
        found: in order.
        record: gets a result for every task, and those that tasks give.
        environment: of the tasks.
        clock: seconds.

    Returns:
        Whether all that could run has passed.
    """
    passed = True
    adopt_orphans()
    for stage in found:
        begin = clock()
        for task in stage.tasks:
            left = stage.limit - (clock() - begin)
            if left <= 1:
                outcome, seconds, tests = "no time left", 0.0, {}
            elif shutil.which(task.command[0], path=environment.get("PATH")) is None:
                outcome, seconds, tests = f"left out: no {task.command[0]} here", 0.0, {}
            elif task.needs and not _is_installed(task.needs, environment):
                outcome, seconds, tests = f"left out: no {task.needs} here", 0.0, {}
            else:
                outcome, seconds, tests = _run(stage.name, task, min(left, task.limit), record, environment)
                passed = passed and outcome == "passed"
            record.result(
                stage=stage.name,
                task=task.name,
                outcome=outcome,
                seconds=round(seconds, 1),
                command=task.command,
                shows=dict(task.shows),
                **({"tests": tests} if tests else {}),
            )
            record.line(f"== {stage.name} / {task.name}: {outcome}, {seconds:.1f} s")
    return passed


def _is_installed(package: str, environment: dict[str, str]) -> bool:
    """Tell whether tasks find a package, installed or carried along."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT).returncode == 0


def _run(
    stage: str, task: Task, limit: float, record: Record, environment: dict[str, str]
) -> tuple[str, float, dict[str, Any]]:
    """Run a task; return its outcome, seconds, and what tests in it said."""
    record.line(f"== {stage} / {task.name} (at most {limit:.0f} s): {' '.join(task.command)}")
    remove_locks(environment)
    counts: dict[str, Any] = {}
    failures: list[Any] = []

    def read(output: IO[str]) -> None:
        for line in output:
            record.line(line.rstrip("\n"))
            if said := _GIVEN.match(line):
                given = _parsed(said[1])
                failures.extend([given] * (given.get("ok") is False))
                record.result(stage=stage, task=task.name, **given)
            elif (found := _TEST.search(line)) and "::" in line:
                counts[found[1]] = counts.get(found[1], 0) + 1
                if found[1] in ("FAILED", "ERROR"):
                    counts.setdefault("failed", []).append(line.strip()[:200])

    begin = time.monotonic()
    process = subprocess.Popen(
        task.command,
        cwd=ROOT,
        env={**environment, **task.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    # In a thread: what a task leaves behind may hold its output open for ever.
    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    over = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        over = True
        _end(process)
    seconds = time.monotonic() - begin
    end_descendants()
    reader.join(_GRACE)
    if over:
        return f"ended after {limit:.0f} s", seconds, counts
    if process.returncode:
        return f"failed with code {process.returncode}", seconds, counts
    return ("passed" if not failures else f"failed: {len(failures)} of its results"), seconds, counts


def remove_locks(environment: Mapping[str, str]) -> None:
    """Remove the locks of compilations that were ended: torch would wait for their ends for ever.

    Args:
        environment: of tasks, none of which is running; locks in its TORCH_EXTENSIONS_DIR are theirs.
    """
    if folder := environment.get("TORCH_EXTENSIONS_DIR"):
        for lock in Path(folder).glob("**/lock"):
            lock.unlink()


def _parsed(line: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except ValueError:
        return {"ok": False, "error": f"no JSON: {line[:200]!r}"}
    return given if isinstance(given, dict) else {"ok": False, "error": "no object"}


def _end(process: subprocess.Popen[str]) -> None:
    """End a task: gently first, so that it can say where it is."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)


def adopt_orphans() -> None:
    """Make this process the parent of what its tasks leave behind, launchers' ranks in sessions of their own say."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """End all processes below this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    below, grown = {os.getpid()}, True
    while grown:
        found = {process for process, parent in parents.items() if parent in below} - below
        below, grown = below | found, bool(found)
    for process in below - {os.getpid()}:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + _GRACE
    with suppress(ChildProcessError):  # when there are no more
        while time.monotonic() < deadline:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.01)


def say(**values: Any) -> None:
    """Give a result to the runner, from inside a task."""
    print(RESULT + json.dumps(values), flush=True)
