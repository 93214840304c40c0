"""Time from the kill of a rank to the next update, for every engine.

    python -m benchmarks.restart --ranks 2 --rounds 3

A run of `arsg-imagenet train` on synthetic images is killed in one rank (kill -9), some updates after its last
checkpoint. Under torchrun with --max-restarts its agent starts the ranks again; elsewhere the whole command is started
again with --resume auto as soon as it has ended, as a scheduler does, whose own queue is not in the time. "forked" is
torch's agent with start_method="fork": ranks are forked from a process that has imported the program, and lose none of
that. Stages: until the launcher or its agent has started a rank again, until the run has its state back and opens its
records, until the first update after that.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.kept_results import machine_results, this_command, write_report
from benchmarks.common.machine import device_name, mpirun

SCRIPT = str(Path(__file__).parents[1] / "launch/train_imagenet.py")
CHECKPOINT_EVERY, KILL_AFTER = 4, 10
LIMIT = 180.0
SETTINGS = {
    "data.source": "synthetic", "data.synthetic_images": 4096, "data.synthetic_classes": 10, "data.image_size": 32,
    "data.workers": 0, "model": "resnet20", "batch_size": 16, "epochs": 1000, "log_every": 1,
    "checkpoint_every": CHECKPOINT_EVERY, "keep_checkpoints": 2, "optimizer.params": "{lr: 0.01}",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way to train and to start again.

    Attributes:
        title: for the table.
        launcher: ranks → command without the program.
        options: of the program.
        in_job: whether the launcher starts the ranks again by itself.
    """

    title: str
    launcher: Callable[[int], list[str]]
    options: Sequence[str]
    in_job: bool = False


def torchrun(ranks: int) -> list[str]:
    """Return torchrun with restarts."""
    return [beside("torchrun"), "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=100"]


def forked(ranks: int) -> list[str]:
    """Return torch's agent, which forks ranks from itself."""
    return [sys.executable, "-m", "benchmarks.restart", "--forked", str(ranks)]


def once(ranks: int) -> list[str]:
    """Return torchrun without restarts."""
    return torchrun(ranks)[:-1]


def deepspeed(ranks: int) -> list[str]:
    """Return DeepSpeed's launcher."""
    return [beside("deepspeed"), "--num_accelerators", str(ranks), "--no_local_rank"]


def horovod(ranks: int) -> list[str]:
    """Return mpirun."""
    return [*mpirun(ranks), sys.executable]


def beside(name: str) -> str:
    """Return a program of this environment."""
    return str(Path(sys.executable).with_name(name))


SHARDED = ["--engine", "ddp", "--engine_options.shard_update", "true"]
ROWS = {
    "single": Row("single, started again", lambda _: [sys.executable], ["--engine", "single"]),
    "ddp": Row("ddp, by torchrun's agent", torchrun, ["--engine", "ddp"], in_job=True),
    "ddp-forked": Row("ddp, forked by torch's agent", forked, ["--engine", "ddp"], in_job=True),
    "ddp-again": Row("ddp, started again", once, ["--engine", "ddp"]),
    "ddp-sharded": Row("ddp with shard_update, by torchrun's agent", torchrun, SHARDED, in_job=True),
    "fsdp": Row("fsdp, by torchrun's agent", torchrun, ["--engine", "fsdp"], in_job=True),
    "fsdp-forked": Row("fsdp, forked by torch's agent", forked, ["--engine", "fsdp"], in_job=True),
    "deepspeed": Row(
        "DeepSpeed ZeRO-1, started again", deepspeed, ["--deepspeed_config", "configs/deepspeed/zero1.json"]
    ),
    "horovod": Row("Horovod (mpirun), started again", horovod, ["--engine", "horovod"]),
    "horovod-sharded": Row(
        "Horovod sharded (mpirun), started again", horovod, ["--engine", "horovod-sharded"]
    ),
}


def measure(row: Row, ranks: int, directory: Path) -> dict[str, float]:
    """Start a run, kill a rank, and time until its next update.

    Raises:
        TimeoutError: something did not come within `LIMIT`.
    """
    run = directory / "run"
    shutil.rmtree(run, ignore_errors=True)
    program = [
        SCRIPT,
        *row.options,
        *(text for key, value in SETTINGS.items() for text in (f"--{key}", str(value))),
    ]
    command = [*row.launcher(ranks), *program, "--output", str(run), "--resume", "auto"]
    log = directory / "log"
    with log.open("w") as output:

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=SCRIPT.rpartition("/launch/")[0],
            )

        job = start()
        started = time.monotonic()
        jobs = [job]
        try:
            wait(lambda: last_update(run) >= KILL_AFTER, log)
            first = time.monotonic() - started
            starts = starts_of(run)
            of_job = ranks_of(job.pid, str(run), ranks)
            lost = last_update(run)
            begin = time.monotonic()
            os.kill(of_job[-1], signal.SIGKILL)
            if not row.in_job:
                job.wait(LIMIT)
                jobs.append(start())
                again = time.monotonic() - begin
            else:
                wait(lambda: bool(set(ranks_of(job.pid, str(run), 1, wait_for=False)) - {*of_job}), log)
                again = time.monotonic() - begin
            wait(lambda: starts_of(run) > starts, log)
            opened, at = time.monotonic() - begin, last_update(run)
            wait(lambda: last_update(run) > at, log)
            updated = time.monotonic() - begin
        finally:
            for process in jobs:
                if process.poll() is not None:
                    continue
                # The launcher first, which would start them again; torchrun's ranks have sessions of their own.
                left = ranks_of(process.pid, str(run), 0)
                os.killpg(process.pid, signal.SIGKILL)
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
    return {"again": again, "opened": opened, "updated": updated, "first": first, "lost": lost - at}


def wait(condition: Callable[[], bool], log: Path) -> None:
    """Look every few milliseconds.

    Raises:
        TimeoutError: with the end of the log.
    """
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(log.read_text()[-3000:])
        time.sleep(0.005)


def last_update(run: Path) -> int:
    """Return the newest update in the records; 0 for none."""
    with suppress(OSError, IndexError, ValueError):
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["update"])
    return 0


def starts_of(run: Path) -> int:
    """Count the starts in the records."""
    with suppress(OSError):
        return (run / "environment.yaml").read_text().count("hosts:")
    return 0


def ranks_of(job: int, run: str, ranks: int, *, wait_for: bool = True) -> list[int]:
    """Find the processes of a job that train: those with the run in their command that started none such."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            if run in (path / "cmdline").read_text():
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    mine = {job}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    found = sorted(pid for pid in mine & parents.keys() if pid not in {parents.get(other) for other in mine})
    if wait_for and len(found) < ranks:
        raise TimeoutError(f"{len(found)} processes of {ranks} ranks were found")
    return found


def main_forked(ranks: int, program: list[str]) -> None:
    """Start ranks by forking this process, which imports what they need first."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    import arsg_dist.ddp.build
    import arsg_dist.fsdp.build
    import arsg_dist.imagenet.training.setup  # noqa: F401

    config = LaunchConfig(
        1,
        1,
        ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=100,
        start_method="fork",
        run_id="restart",
    )
    elastic_launch(config, run_script)(program)


def run_script(program: list[str]) -> None:
    """Run a script as torchrun does."""
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")


def report(measured: dict[str, list[dict[str, Any]]], ranks: int, rounds: int) -> str:
    """Return the table in Markdown."""
    lines = [
        "# From a kill to the next update",
        "",
        f"- device: {device_name('cpu')}",
        f"- command: `{this_command()}`",
        f"- {ranks} ranks of this machine, resnet20 on images of 32 × 32; kill -9 of the last rank; seconds, medians "
        f"of {rounds}",
        "- a rank runs again: its process is there (started again: the command is); state is back: the checkpoint is "
        "loaded and the records are open; updates lost: made again, of at most "
        f"{CHECKPOINT_EVERY} between checkpoints; first start: from the command to update {KILL_AFTER}, for comparison",
        "",
        "| | a rank runs again | state is back | next update | updates lost | first start |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in measured.items():
        keys = ("again", "opened", "updated", "lost", "first")
        median = {key: statistics.median(each[key] for each in found) for key in keys}
        cells = [f"{median[key]:.0f}" if key == "lost" else f"{median[key]:.2f}" for key in keys]
        lines.append(f"| {' | '.join([ROWS[name].title, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the table."""
    if sys.argv[1:2] == ["--forked"]:
        main_forked(int(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser("python -m benchmarks.restart", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--output", type=Path, default=machine_results("cpu") / "restart.md")
    arguments = parser.parse_args()
    measured: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        for _ in range(arguments.rounds):
            for name in arguments.rows:
                found = measure(ROWS[name], 1 if name == "single" else arguments.ranks, Path(directory))
                print(name, {key: round(value, 2) for key, value in found.items()}, flush=True)
                measured.setdefault(name, []).append(found)
    write_report(arguments.output, report(measured, arguments.ranks, arguments.rounds))


if __name__ == "__main__":
    main()
