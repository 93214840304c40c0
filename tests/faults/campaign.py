"""Stops and kills at random moments of real trainings, and what was lost; run by hand.

    python -m tests.faults.campaign run FILE --faults 200 --seed 1    # goes on where FILE (JSON lines) ends
    python -m tests.faults.campaign run FILE --seconds 240 --keep DIR # a piece; what runs are compared with is kept
    python -m tests.faults.campaign table FILE                        # Markdown, for docs/reliability.md

A run is a training that is struck, started again with --resume, struck again ... and at last left to finish. Checked
after each strike: every rank ended in time, and of a stop with 75, a checkpoint whose every byte is right and
requeue.json; no process is left, also none of the loaders; the next start goes on from the update that the stop came
after, or after a kill from at most `EVERY` updates before. At the end: records and weights are bit by bit those of a
run that was never struck.
"""

import argparse
import json
import os
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from arsg_dist.checkpoint import SavedRun
from arsg_dist.engine.job import PREEMPTED
from arsg_dist.imagenet.signals import MARKER
from tests.imagenet.test_training import without_speed
from tests.support.engines import ENGINES, STAGES
from tests.support.warm_ranks import EndedJob, WarmRanks, warm_ranks

JOB = "tests/imagenet/jobs/imagenet_job.py"
EVERY = 2  # updates between checkpoints
UPDATES = 20  # five an epoch
SETTINGS = [
    *("--data.source", "synthetic", "--data.synthetic_images", 60, "--data.synthetic_classes", 3),
    *(
        "--data.image_size",
        16,
        "--model",
        "resnet20",
        "--epochs",
        4,
        "--batch_size",
        12,
        "--val_batch_size",
        4,
    ),
    *(
        "--optimizer.params",
        "{lr: 0.01, mu: 0.1}",
        "--schedule.name",
        "cosine",
        "--schedule.warmup_epochs",
        0.5,
    ),
    *("--checkpoint_every", EVERY, "--log_every", 1, "--seed", 7),
]
RANKS = {
    "single": 1,
    **dict.fromkeys(("ddp", "fsdp", "deepspeed", "deepspeed-3", "horovod", "horovod-sharded"), 2),
}
# Three of eight are kills.
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGKILL", "SIGKILL")
TO = ("one rank", "process group")
WORKERS = (0, 2)
MOMENTS = {
    "training step": ("forward", "backward", "reduce", "step", "after step"),
    "validation": ("validation",),
    "checkpoint written": ("write", "sync", "rename"),
    "data workers start": ("loader process",),
    "any time": ("time",),
}
WITHIN = 240  # seconds in which all ranks must have ended, on a machine that is busy
FAULTS_PER_RUN = 5


@dataclass(frozen=True)
class Strike:
    """A signal to ranks at a moment.

    Attributes:
        signal: its name.
        to: of `TO`. The process group of every rank, loader processes and all, or one rank alone.
        workers: loader processes per rank and split.
        moment: of `MOMENTS`.
        point: of `fault_points.POINTS`, or "time".
        at: at which pass of it in this start, or after how many seconds.
        rank: the one, where it is one.
    """

    signal: str
    to: str
    workers: int
    moment: str
    point: str
    at: float
    rank: int

    @classmethod
    def by_chance(cls, chance: random.Random, ranks: int) -> "Strike":
        moment = chance.choice(list(MOMENTS))
        workers = 2 if moment == "data workers start" else chance.choice(WORKERS)
        return cls.at_moment(chance, chance.choice(SIGNALS), chance.choice(TO), workers, moment, ranks)

    @classmethod
    def at_moment(
        cls, chance: random.Random, signal: str, to: str, workers: int, moment: str, ranks: int
    ) -> "Strike":
        point = chance.choice(MOMENTS[moment])
        if moment == "data workers start" and not workers:
            point = "loader"
        at: float = chance.randint(1, 4)
        if point == "time":
            at = round(chance.uniform(0, 2.5), 3)
        elif point == "sync":
            at = chance.randint(1, 20)  # the first eight are of the run's records
        elif point in ("loader", "rename"):
            at = 1
        rank = 0 if point in ("write", "sync", "rename") else chance.randrange(ranks)
        return cls(signal, to, workers, moment, point, at, rank)

    def fault(self, directory: Path) -> dict[str, Any]:
        group = self.to == "process group"
        # What only rank 0 does strikes there: a group's signal then comes to the groups of the others a moment later.
        everywhere = group and self.point not in ("write", "sync", "rename")
        return {
            "rank": "all" if everywhere else self.rank,
            "do": "signal",
            "signal": self.signal,
            "to": "group" if group else "rank",
            "point": self.point,
            "at": self.at,
            "directory": str(directory),
        }


@dataclass
class StruckRun:
    """One training and its starts."""

    warm: WarmRanks
    engine: str
    directory: Path
    struck_at: int | None = None
    """Update after which the last strike was seen, None before the first."""
    stopped: bool = False
    lost: list[int] = field(default_factory=list)

    def start(self, workers: int, *faults: dict[str, Any]) -> EndedJob:
        """Start, or start again where a checkpoint is."""
        resumable = any(self.directory.glob("checkpoints/step-*"))
        if not resumable:
            shutil.rmtree(self.directory, ignore_errors=True)
        job = run(
            self.warm,
            self.engine,
            *("--output", self.directory, "--data.workers", workers),
            *(["--resume"] if resumable else []),
            faults=faults,
        )
        found = re.search(r"resuming from .*: (\d+) updates", job.output)
        if self.struck_at is not None and (found or not resumable):
            lost = max(0, self.struck_at - (int(found.group(1)) if found else 0))
            self.lost.append(lost)
            assert lost <= (0 if self.stopped else EVERY), f"{lost} updates lost"
        self.struck_at = None
        return job

    def strike(self, strike: Strike) -> dict[str, Any]:
        """Start, struck; what came of it."""
        kill = strike.signal == "SIGKILL"
        job = self.start(strike.workers, strike.fault(self.directory))
        nothing_left(job)
        if job.fault_at is None:
            assert set(job.codes) == {0}, f"not struck, and ended with {job.codes}:\n{job.output[-6000:]}"
            return {"struck": False}
        done = set(job.codes) == {0} or (kill and updates_done(self.directory) == UPDATES)
        if not done:
            self.struck_at, self.stopped = updates_done(self.directory), not kill
            if kill:
                assert -9 in job.codes, f"{job.codes}:\n{job.output[-6000:]}"
                assert all(job.codes), f"{job.codes}:\n{job.output[-6000:]}"
            else:
                self.check_stop(job, strike.signal)
        # A killed rank whose disk is busy is still there for a while, its connections too: the others cannot know.
        gone = [at - job.fault_at for at, code in zip(job.ended, job.codes, strict=True) if code == -9]
        return {
            "struck": True,
            "done": done,
            "codes": job.codes,
            "seconds": round(job.seconds_to_end(), 2),
            "seconds until the killed had gone": round(max(gone, default=0.0), 2),
        }

    def check_stop(self, job: EndedJob, signal: str) -> None:
        assert set(job.codes) == {PREEMPTED}, f"{job.codes}:\n{job.output[-6000:]}"
        for text in ("exited unexpectedly", "leaked", "Traceback"):
            assert text not in job.output, job.output[-6000:]
        marker = json.loads((self.directory / MARKER).read_text())
        assert marker["signals"] == [signal], marker
        saved = SavedRun(Path(marker["checkpoint"]))
        assert not saved.damage(), saved.damage()
        assert saved.progress["position"]["update"] == marker["update"]
        self.struck_at = marker["update"]

    def finish(self, whole: Path) -> None:
        """Let it end, and compare it with a run that was never struck."""
        job = self.start(0)
        assert set(job.codes) == {0}, job.output[-6000:]
        assert not (self.directory / MARKER).exists(), "requeue.json is there after the end"
        recorded, right = (without_speed(records_of(path)) for path in (self.directory, whole))
        updates = [(record["kind"], record["update"]) for record in recorded]
        assert updates == [(record["kind"], record["update"]) for record in right], f"records of {updates}"
        # Where a run goes on it sums anew since the last record, in another order.
        of_epochs = [
            [record for record in records if record["kind"] == "epoch"] for records in (recorded, right)
        ]
        assert of_epochs[0] == of_epochs[1], f"records {of_epochs[0]} and not {of_epochs[1]}"
        expected, finished = weights(whole), weights(self.directory)
        for name, tensor in expected.items():
            assert torch.equal(finished[name], tensor), name


def run(
    warm: WarmRanks, engine: str, *arguments: object, faults: tuple[dict[str, Any], ...] = ()
) -> EndedJob:
    started = (ENGINES | STAGES)[engine]
    return warm.run_program(
        started.launcher,
        JOB,
        *started.options,
        *SETTINGS,
        *arguments,
        environment={**os.environ, "ARSG_TEST_SMALL_NETWORK": "1"},
        ranks=RANKS[engine],
        faults=faults,
        timeout=WITHIN,
    )


def updates_done(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    done = 0
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            done = json.loads(line)["update"]
        except json.JSONDecodeError:  # cut off by the kill
            break
    return done


def records_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "weights" / "last.safetensors")


def nothing_left(job: EndedJob) -> None:
    """Check that every process that the ranks have started ends after them, soon but for a busy machine."""
    end = time.monotonic() + WITHIN
    while left := [process for group in job.groups for process in alive(group)]:
        assert time.monotonic() < end, f"processes are left: {left}"
        time.sleep(0.05)


def alive(group: int) -> list[str]:
    """The processes of a group that are no zombies."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                state, _, of_group = (directory / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(of_group) == group and state != "Z":
                    found.append(f"{directory.name} {(directory / 'cmdline').read_text()[:200]}")
            except (FileNotFoundError, ProcessLookupError):
                pass
    return found


def campaign(
    file: Path, faults: int, seed: int, engines: list[str], seconds: float, keep: Path | None
) -> int:
    """Strike until the file has so many strikes, or no more runs after so many seconds; how many runs went wrong."""
    end = time.monotonic() + seconds
    records = read(file)
    made = sum(1 for record in records if record["seed"] == seed and record.get("struck"))
    number = 1 + max((record["run"] for record in records if record["seed"] == seed), default=-1)
    warm, bad = warm_ranks(), 0
    with tempfile.TemporaryDirectory() as temporary, file.open("a") as out:
        directory = Path(temporary)
        unstruck = (keep or directory).resolve()
        while made < faults and time.monotonic() < end:
            chance = random.Random(f"{seed}/{number}")
            engine = engines[number % len(engines)]
            whole = unstruck / engine
            if not (whole / "weights" / "last.safetensors").exists():
                shutil.rmtree(whole, ignore_errors=True)
                job = run(warm, engine, "--output", whole, "--data.workers", 0)
                assert set(job.codes) == {0}, job.output[-6000:]
            for record in one_run(warm, engine, directory / f"run-{number}", whole, chance):
                made += bool(record.get("struck"))
                bad += "wrong" in record
                record = {"seed": seed, "run": number, "engine": engine, **record}
                out.write(json.dumps(record) + "\n")
                out.flush()
                print(made, json.dumps(record)[:1000], flush=True)
            shutil.rmtree(directory / f"run-{number}", ignore_errors=True)
            number += 1
    return bad


def one_run(
    warm: WarmRanks, engine: str, directory: Path, whole: Path, chance: random.Random
) -> Iterator[dict[str, Any]]:
    """Strike one training several times and let it finish; a record of each strike, and one of the end."""
    struck = StruckRun(warm, engine, directory)
    try:
        for _ in range(FAULTS_PER_RUN):
            strike = Strike.by_chance(chance, RANKS[engine])
            record = {**vars(strike), "wrong": ""}
            record |= struck.strike(strike)
            del record["wrong"]
            yield record
            if not record["struck"] or record["done"]:
                break
        struck.finish(whole)
        yield {"finished": True, "lost": struck.lost}
    except AssertionError as error:
        yield {**vars(strike), "wrong": str(error), "lost": struck.lost}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(file: Path) -> str:
    """What was struck how often, by engine and by moment, how long it took, and what was lost."""
    records = read(file)
    struck = [record for record in records if record.get("struck") and not record["done"]]
    lines = ["| strikes | number | seconds until all ranks had ended, median (longest) |", "|---|---|---|"]
    for key in ("engine", "signal", "to", "workers", "moment"):
        for value, number in sorted(Counter(record[key] for record in struck).items(), key=str):
            seconds = [record["seconds"] for record in struck if record[key] == value]
            lines.append(f"| {key} {value} | {number} | {median(seconds):.2f} ({max(seconds):.2f}) |")
    finished = [record for record in records if record.get("finished")]
    wrong = [record for record in records if "wrong" in record]
    lost = Counter(lost for record in finished for lost in record["lost"])
    lines += [
        "",
        f"{len(struck)} strikes, {len(finished)} runs that finished with the bits of one never struck, "
        f"{len(wrong)} that went wrong. Updates lost per strike: "
        + ", ".join(f"{updates} ({number} times)" for updates, number in sorted(lost.items())),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    strikes = commands.add_parser("run")
    strikes.add_argument("file", type=Path)
    strikes.add_argument("--faults", type=int, default=200)
    strikes.add_argument("--seed", type=int, default=1)
    strikes.add_argument("--engines", nargs="+", choices=list(RANKS), default=list(RANKS))
    strikes.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    strikes.add_argument(
        "--keep", type=Path, help="where the runs are kept that are never struck, of this revision"
    )
    commands.add_parser("table").add_argument("file", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.file))
        return 0
    bad = campaign(options.file, options.faults, options.seed, options.engines, options.seconds, options.keep)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
