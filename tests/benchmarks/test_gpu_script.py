"""The script for a GPU, rehearsed on the CPU: what it writes whatever its tasks do, and what is made of that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.__main__ import environment_of
from benchmarks.gpu.runner import Record, run_stages
from benchmarks.gpu.stages import ROWS, Setting, Stage, Task, stages
from tests.support.launchers import REPOSITORY


def task(name: str, program: str, limit: float = 20.0, **options: Any) -> Task:
    return Task(name, [sys.executable, "-c", program], limit, **options)


def ran(folder: Path, *found: Stage) -> list[dict[str, Any]]:
    # In a process of its own: the runner ends all that is below it.
    child = os.fork()
    if not child:
        run_stages(found, Record(folder), {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder / "extensions")})
        os._exit(0)
    os.waitpid(child, 0)
    return report.read(folder)


LOCK = """
import os, sys, time
from torch.utils.file_baton import FileBaton
folder = os.environ["TORCH_EXTENSIONS_DIR"] + "/cpu_adam"
lock = folder + "/lock"
def wait():
    FileBaton(lock).try_acquire()
    time.sleep(60)
"""


def test_whatever_a_task_does_the_next_is_run_and_all_is_written_down(tmp_path: Path) -> None:
    """Catches a quarter of an hour lost to one task that hangs, leaves a process behind, crashes or prints nonsense, or
    that is ended while it compiles: its lock would make later ones wait for ever."""
    orphan = "import subprocess as s; print('left', s.Popen(['sleep', '60'], start_new_session=True).pid)"
    begin = time.monotonic()
    found = ran(
        tmp_path,
        Stage(
            "first",
            60,
            [
                task(
                    "hangs",
                    'import time; print(\'RESULT {"kind": "a", "n": 1}\', flush=True); time.sleep(60)',
                    1.0,
                ),
                task("is ended while it compiles", LOCK + "os.makedirs(folder); wait()", 5.0),
                task("compiles after it", LOCK + "sys.exit(not FileBaton(lock).try_acquire())"),
                task("crashes", "import os; os.abort()"),
                task("leaves a process behind", orphan),
                task(
                    "says no", 'print(\'[0]<stdout>:RESULT {"kind": "a", "ok": false}\'); print(\'RESULT {\')'
                ),
                Task("is not here", ["no-such-program"], 5),
                task("lacks a package", "pass", needs="no_such_package"),
                task("has its package", "pass", needs="torch"),
            ],
        ),
        Stage("second", 0.5, [task("comes too late", "pass")]),
        Stage(
            "third",
            20,
            [
                task(
                    "tests",
                    "print('[gw1] [ 50%] PASSED tests/a.py::b'); print('tests/a.py::c FAILED [100%]')",
                )
            ],
        ),
    )
    assert time.monotonic() - begin < 50
    ends = {result["task"]: result for result in found if "outcome" in result}
    assert {name: result["outcome"] for name, result in ends.items()} == {
        "hangs": "ended after 1 s",
        "is ended while it compiles": "ended after 5 s",
        "compiles after it": "passed",
        "lacks a package": "left out: no no_such_package here",
        "has its package": "passed",
        "crashes": "failed with code -6",
        "leaves a process behind": "passed",
        "says no": "failed: 2 of its results",
        "is not here": "left out: no no-such-program here",
        "comes too late": "no time left",
        "tests": "passed",
    }
    assert ends["tests"]["tests"] == {"PASSED": 1, "FAILED": 1, "failed": ["tests/a.py::c FAILED [100%]"]}
    assert found[0] == {"stage": "first", "task": "hangs", "kind": "a", "n": 1}
    log = (tmp_path / "log.txt").read_text()
    left = int(log.partition("left ")[2].split()[0])
    assert not Path(f"/proc/{left}").exists()


def run_of(device: str, outcome: str = "passed") -> list[dict[str, Any]]:
    machine = {"kind": "machine", "device": "NVIDIA H100 80GB HBM3", "on": device, "revision": "abc"}
    shown = [task.shows for stage in stages(Setting(Path("/x"))) for task in stage.tasks]
    ends = [
        {
            "stage": "s",
            "task": str(n),
            "outcome": outcome,
            "seconds": 1.0,
            "command": ["/p/python", "-m", "x"],
            "shows": shows,
        }
        for n, shows in enumerate(shown)
    ]
    return [{**machine, "versions": {"torch": "2.11.0", "CUDA": "13.0"}}, *ends]


def test_the_column_says_what_was_run_and_nothing_else(tmp_path: Path) -> None:
    """Catches a row that is filled by a rehearsal, by a task that failed or did not run, or on top of another row."""
    readme = (REPOSITORY / "README.md").read_text()
    filled = report.column(readme, run_of("cuda"), "benchmarks/results/gpu/h100.md")
    changed = [
        (before, after)
        for before, after in zip(readme.splitlines(), filled.splitlines(), strict=True)
        if before != after
    ]
    assert sorted(row for row in ROWS for before, _ in changed if before.startswith(f"| {row}")) == sorted(
        ROWS
    )
    for before, after in changed:
        assert after.split("|")[:3] == before.split("|")[:3]
        assert (
            "(NVIDIA H100 80GB HBM3, torch 2.11.0, CUDA 13.0; [results](benchmarks/results/gpu/h100.md)) |"
            in after
        )
        assert "failed" not in after
    assert report.column(filled, run_of("cuda"), "benchmarks/results/gpu/h100.md") == filled
    for outcome in ("no time left", "left out: no ncu here"):
        assert report.column(readme, run_of("cuda", outcome), "x") == readme
    failed = report.column(readme, run_of("cuda", "failed with code 1"), "x")
    assert failed.count("**failed**: ") > len(ROWS)
    with pytest.raises(SystemExit, match="rehearsal"):
        report.column(readme, run_of("cpu"), "x")
    page = report.page(
        [*run_of("cuda"), {"kind": "copy", "stage": "s", "task": "0", "gigabytes_per_second": 3000.0}],
        ["a.md"],
    )
    assert "| 3000.0 |" in page
    assert "abc" in page
    assert "[a.md](a.md)" in page


@pytest.mark.parametrize("fits", [True, False])
def test_what_was_carried_along_is_found_behind_what_is_there(fits: bool, tmp_path: Path) -> None:
    """Catches packages of another Python, and carried ones in front of those that the machine's torch came with."""
    site = tmp_path / "packed"
    site.mkdir()
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    (site / "python-version").write_text(f"{here if fits else '2.7'}\n")
    for name in ("carried_along", "pytest"):
        (site / f"{name}.py").write_text("")
    with tarfile.open(tmp_path / "site.tar.gz", "w:gz") as archive:
        archive.add(site, ".")
    unpack = [sys.executable, "-m", "benchmarks.gpu.unpack", tmp_path / "run", tmp_path / "site.tar.gz"]
    said = subprocess.run(unpack, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert json.loads(said.removeprefix("RESULT "))["found"] is fits
    program = "import pytest; assert pytest.raises; import carried_along"
    environment = environment_of(Setting(tmp_path / "run", "cpu"))
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (ended.returncode == 0) is fits, ended.stderr
    assert fits or "No module named 'carried_along'" in ended.stderr


@pytest.mark.turn(0)
def test_the_rehearsal_runs_to_its_end(tmp_path: Path) -> None:
    """Catches a task whose program does not start: on the day it would cost its stage."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--dry",
        "--short",
        "--output",
        tmp_path,
        "--to",
        "optimizer",
    ]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-5000:]
    results = report.read(tmp_path)
    ends = {result["task"]: result["outcome"] for result in results if "outcome" in result}
    assert set(ends.values()) == {"passed"}
    assert {"machine", "copy", "bits"} <= {result.get("kind") for result in results}
    page = report.page(results, [])
    assert all(f"| {name} | passed |" in page for name in ends)
    # Of the others that their programs are there.
    modules = {
        task.command[task.command.index("-m") + 1]
        for stage in stages(Setting(tmp_path))
        for task in stage.tasks
        if "-m" in task.command
    }
    for module in modules - {"pytest"}:
        place = REPOSITORY / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists()
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["kind"] == "machine"
