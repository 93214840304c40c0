"""Stops through the real launchers, each way a signal can be delivered; run by hand.

    python -m tests.faults.launcher_stops run FILE      # goes on where FILE (JSON lines) ends
    python -m tests.faults.launcher_stops run FILE --unknown
    python -m tests.faults.launcher_stops table FILE    # Markdown; what only a probe has shown has a †

Every launcher × delivery × signal is one cell. Loader processes and the moment take turns, so that each pair of a
launcher, a delivery or a signal with one of them is there. A cell that has saved goes on, on warm ranks, and must end
with the bits of a run that was never stopped. `run FILE --probe` asks of the launchers alone, all of them in some
minutes: the ranks are `tests/support/stopped_job.py`, which takes `--seconds` to save.
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from arsg_dist.checkpoint import SavedRun
from arsg_dist.imagenet.signals import MARKER
from tests.faults.campaign import JOB, RANKS, SETTINGS, UPDATES, StruckRun, read, run, updates_done
from tests.support.engines import ENGINES
from tests.support.launchers import _command
from tests.support.warm_ranks import REPOSITORY, free_port, warm_ranks

# launcher → engine
LAUNCHERS = {
    "python": "single",
    "deepspeed": "deepspeed",
    "torchrun": "ddp",
    "mpirun": "horovod",
    "horovodrun": "horovod-sharded",
    "arsg-dist launch local (deepspeed)": "deepspeed",
    "arsg-dist launch local (mpirun)": "horovod",
}
TO = ("launcher", "process group", "one rank")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
WORKERS = (0, 2)
MOMENTS = {  # → point of `fault_points`, at which pass, on which ranks
    "training step": ("after step", 3, "all"),
    "validation": ("validation", 1, "all"),
    "checkpoint written": ("rename", 1, 0),
    "data workers start": ("loader", 1, "all"),
}
WITHIN = 90


def cells() -> list[dict[str, Any]]:
    """All, each with its number of loader processes and its moment."""
    made = []
    for number, (launcher, to, name) in enumerate(itertools.product(LAUNCHERS, TO, SIGNALS)):
        if launcher == "python" and to == "one rank":
            continue
        kind, delivery, sent = list(LAUNCHERS).index(launcher), TO.index(to), SIGNALS.index(name)
        moment = list(MOMENTS)[(kind + delivery + 2 * sent + number // 27) % 4]
        workers = WORKERS[(kind + delivery + sent + number // 4) % 2]
        made.append({"launcher": launcher, "to": to, "signal": name, "workers": workers, "moment": moment})
    return made


def command(launcher: str, engine: str, directory: Path) -> list[str]:
    ranks = RANKS[engine]
    if launcher.startswith("arsg-dist"):
        rendezvous = "deepspeed" if engine == "deepspeed" else "horovod"
        options = [
            "--engine",
            rendezvous,
            "--ranks-per-node",
            str(ranks),
            "--cpu",
            "--directory",
            str(REPOSITORY),
        ]
        return [sys.executable, "-m", "arsg_dist.cli.main", "launch", "local", *options, "--"]
    return _command({"python": "alone"}.get(launcher, launcher), ranks, free_port())


def stop(cell: dict[str, Any], directory: Path, probe: float | None = None) -> dict[str, Any]:
    """Start a cell's job, stop it at its moment, and say what came of it.

    Args:
        cell: of `cells`.
        directory: of the cell alone.
        probe: seconds that a rank takes to save which does nothing else.
    """
    engine = LAUNCHERS[cell["launcher"]]
    point, at, where = MOMENTS[cell["moment"]]
    fault = {"rank": where, "do": "pause", "point": point, "at": at, "directory": str(directory)}
    log = (directory / "log").open("w")
    training = [str(REPOSITORY / JOB), *map(str, (*ENGINES[engine].options, *SETTINGS))]
    training += ["--output", str(directory / "run"), "--data.workers", str(cell["workers"])]
    probing = [str(REPOSITORY / "tests/support/stopped_job.py"), str(directory), str(probe)]
    job = subprocess.Popen(
        [*command(cell["launcher"], engine, directory), *(training if probe is None else probing)],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "ARSG_TEST_FAULTS": json.dumps([fault]),
            "ARSG_TEST_SMALL_NETWORK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "MASTER_PORT": str(free_port()),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        # A shell's & has background jobs ignore it, which a terminal's do not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    expected = RANKS[engine] if where == "all" or probe is not None else 1
    try:
        wait(lambda: len(list(directory.glob("at-*"))) == expected or job.poll() is not None, 240)
        at_moment = sorted(int(path.name.removeprefix("at-")) for path in directory.glob("at-*"))
        assert len(at_moment) == expected, (
            f"the moment did not come:\n{(directory / 'log').read_text()[-3000:]}"
        )
        number, sent = signal.Signals[cell["signal"]], time.monotonic()
        if cell["to"] == "process group":
            os.killpg(job.pid, number)
        else:
            os.kill(job.pid if cell["to"] == "launcher" else at_moment[-1], number)
        time.sleep(0.5)
        (directory / "go").touch()
        code: int | str
        try:
            code = job.wait(WITHIN)
        except subprocess.TimeoutExpired:
            code = "still running"
        seconds = round(time.monotonic() - sent, 1)
        # Ranks that have outlived their launcher get this long to save.
        with suppress(AssertionError):
            wait(lambda: not processes_of(directory), 40)
        left = processes_of(directory)
    finally:
        for process in processes_of(directory):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if job.poll() is None:
            job.kill()
    marker = directory / "run" / MARKER
    saved = marker.exists() if probe is None else len(list(directory.glob("saved-*"))) == expected
    if saved and probe is None:
        found = json.loads(marker.read_text())
        checkpoint = SavedRun(REPOSITORY / found["checkpoint"])
        assert not checkpoint.damage(), checkpoint.damage()
        assert checkpoint.progress["position"]["update"] == found["update"]
    code = 128 - code if isinstance(code, int) and code < 0 else code
    trains_on = not saved and (bool(left) or updates_done(directory / "run") == UPDATES)
    shown = Counter(re.findall("FutureWarning: .*", (directory / "log").read_text()))
    return {
        **{"code": code, "seconds": seconds, "saved": saved, "trains on": trains_on},
        "most of one FutureWarning": max(shown.values(), default=0),
    }


def wait(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def processes_of(directory: Path) -> list[int]:
    """Every process with the cell's environment: launchers, ranks and what they have started."""
    found, sought = [], str(directory).encode()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            if sought in (path / "environ").read_bytes() and state != "Z":
                found.append(int(path.name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument(
        "--unknown", action="store_true", help="only cells of which FILE has nothing, no probe either"
    )
    parser.add_argument(
        "--begin-within", type=float, default=math.inf, metavar="SECONDS", help="begin no cell after so many"
    )
    parser.add_argument("--launchers", nargs="+", choices=list(LAUNCHERS), default=list(LAUNCHERS))
    options = parser.parse_args()
    probe = options.seconds if options.probe else None
    if options.command == "table":
        print(table(options.file))
        return 0
    done = {
        (record["launcher"], record["to"], record["signal"])
        for record in read(options.file)
        if (options.unknown or ("probe seconds" in record) == options.probe) and "wrong" not in record
    }
    warm, bad, whole = warm_ranks(), 0, dict[str, Path]()
    end = time.monotonic() + options.begin_within
    with tempfile.TemporaryDirectory() as temporary, options.file.open("a") as out:
        for number, cell in sorted(
            enumerate(cells()), key=lambda pair: pair[0] * 7 % 61
        ):  # each launcher soon
            key = (cell["launcher"], cell["to"], cell["signal"])
            if key in done or cell["launcher"] not in options.launchers or time.monotonic() > end:
                continue
            engine, directory = LAUNCHERS[cell["launcher"]], Path(temporary) / f"cell-{number}"
            if engine not in whole and probe is None:
                job = run(warm, engine, "--output", Path(temporary) / engine, "--data.workers", 0)
                assert set(job.codes) == {0}, job.output[-6000:]
                whole[engine] = Path(temporary) / engine
            directory.mkdir()
            record = dict(cell)
            try:
                record |= stop(cell, directory, probe)
                if probe is not None:
                    record |= {"probe seconds": probe}
                elif record["saved"]:
                    StruckRun(warm, engine, directory / "run").finish(whole[engine])
                    record["same bits"] = True
            except AssertionError as error:
                record["wrong"] = str(error)
                bad += 1
            out.write(json.dumps(record) + "\n")
            out.flush()
            print(json.dumps(record)[:3000], flush=True)
    return 1 if bad else 0


def table(file: Path) -> str:
    """One row for each launcher and delivery, one column for each signal."""
    # A training's result goes before that of a probe.
    made = [record for record in read(file) if "wrong" not in record]
    made.sort(key=lambda record: "probe seconds" not in record)
    records = {(record["launcher"], record["to"], record["signal"]): record for record in made}
    lines = ["| launcher | delivered to | " + " | ".join(SIGNALS) + " |", "|---|---|" + "---|" * len(SIGNALS)]
    for launcher, to in itertools.product(LAUNCHERS, TO):
        row = [records.get((launcher, to, name)) for name in SIGNALS]
        if any(row):
            lines.append(f"| {launcher} | {to} | " + " | ".join(map(shown, row)) + " |")
    return "\n".join(lines)


def shown(record: dict[str, Any] | None) -> str:
    if record is None:
        return "not run"
    mark = " †" if "probe seconds" in record else ""
    if record["saved"]:
        return f"saved, {record['code']}{mark}"
    return f"**not saved, {record['code']}**" + (", ranks train on" if record["trains on"] else "") + mark


if __name__ == "__main__":
    raise SystemExit(main())
