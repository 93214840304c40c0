"""A study: which runs there are, from a YAML file, and how those that are missing get done."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.study.paper import distributed
from benchmarks.study.paper.data import load_images
from benchmarks.study.paper.optimizers import NAMES
from benchmarks.study.paper.run import Run, train, write
from benchmarks.study.paper.tasks import TASKS

KINDS = ("table", "map", "batch", "engines", "theta", "variants", "paired")
ENGINES = ("single", "zero2", "horovod-sharded")
_FIXED = {"epochs", "train_images", "val_images", "theta"}
_KEYS = {
    "kind",
    "title",
    "task",
    "optimizers",
    "seeds",
    "variants",
    "batch_sizes",
    "lr_scaling",
    "engines",
    "ranks",
}


@dataclass(frozen=True)
class Member:
    """A run in a study, under the label it has in tables and pictures."""

    label: str
    run: Run


@dataclass(frozen=True)
class Study:
    """Runs that are reported together.

    Attributes:
        name: of the study.
        kind: which table and picture it gets, one of `KINDS`.
        title: for people.
        members: its runs.
        settings: as in the file.
    """

    name: str
    kind: str
    title: str
    members: tuple[Member, ...]
    settings: dict[str, Any]


def read_studies(path: Path) -> list[Study]:
    """The studies of a file. README.md says what may stand there.

    Raises:
        ValueError: unknown keys, tasks or optimizers; every problem names its study.
    """
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold studies: name → settings")
    return [_study(name, settings) for name, settings in content.items()]


def _study(name: str, settings: dict[str, Any]) -> Study:
    unknown = set(settings) - _KEYS - _FIXED
    if unknown:
        raise ValueError(f"study {name}: unknown keys {sorted(unknown)}")
    for key, allowed in (("task", TASKS), ("kind", KINDS)):
        if settings.get(key) not in allowed:
            raise ValueError(f"study {name}: {key} must be one of {', '.join(allowed)}")
    engines = set(settings.get("engines", [])) - set(ENGINES)
    if engines:
        raise ValueError(f"study {name}: unknown engines {sorted(engines)}; known: {', '.join(ENGINES)}")
    wrong = set(settings.get("optimizers", [])) - set(NAMES)
    wrong |= {v["optimizer"] for v in settings.get("variants", {}).values()} - set(NAMES)
    if wrong:
        raise ValueError(f"study {name}: unknown optimizers {sorted(wrong)}; known: {', '.join(NAMES)}")
    members = tuple(_members(settings))
    foreign = {m.run.optimizer for m in members if m.run.engine == "zero2"} - {"ARSG", "ARSGB", "RSG"}
    if foreign:
        raise ValueError(f"study {name}: zero2 runs ARSG, ARSGB and RSG, not {', '.join(sorted(foreign))}")
    if not members:
        raise ValueError(f"study {name}: no runs; give optimizers or variants")
    return Study(name, settings["kind"], settings.get("title", name), members, settings)


def _members(settings: dict[str, Any]) -> Iterator[Member]:
    fixed = {key: settings[key] for key in _FIXED & set(settings)}
    variants = {name: {"optimizer": name} for name in settings.get("optimizers", [])}
    variants |= settings.get("variants", {})
    axes = (
        range(settings.get("seeds", 1)),
        settings.get("engines", ["single"]),
        settings.get("ranks", [1]),
        settings.get("batch_sizes", [None]),
        settings.get("lr_scaling", ["none"]),
    )
    seen = set()
    # The seed varies slowest, so that a study that was cut short has compared equals.
    for (seed, engine, ranks, batch, scaling), (label, variant) in itertools.product(
        itertools.product(*axes), variants.items()
    ):
        values = {key: v if isinstance(v, list) else [v] for key, v in variant.items() if key != "optimizer"}
        for point in itertools.product(*values.values()):
            protocol = TASKS[settings["task"]].batch_size
            run = Run(
                settings["task"],
                variant["optimizer"],
                seed,
                batch_size=None if batch == protocol else batch,
                lr_scaling="none" if batch in (None, protocol) else scaling,
                settings=dict(zip(values, point, strict=True)),
                engine=engine,
                ranks=ranks,
                **fixed,
            )
            if repr(run) not in seen:  # at the protocol's batch size all scalings are the same run
                seen.add(repr(run))
                yield Member(label, run)


def carry_out(
    studies: list[Study],
    output: Path,
    device: torch.device,
    directories: dict[str, Path | None],
    minutes: float | None = None,
    processes: int = 1,
) -> int:
    """Does the runs whose curve is not there yet.

    Args:
        studies: the first seed of all of them in this order, then the second, ...
        output: directory of the curves.
        device: to train on.
        directories: data set → its directory.
        minutes: start no run after so many; None for no limit.
        processes: how many runs at once.

    Returns:
        The number of runs that are still missing.

    Raises:
        ValueError: a data set is needed that is not there; before any run.
    """
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    todo: dict[str, Run] = {}
    for study in studies:
        for member in study.members:
            name = member.run.file_name(device.type)
            if not (output / name).is_file():
                todo[name] = member.run
    for data_set in {TASKS[run.task].images for run in todo.values()}:
        load_images(data_set, directories.get(data_set))

    def allowed() -> bool:
        return minutes is None or time.monotonic() - started < 60 * minutes

    # The first seed of every study, then the second, ...: cut short, there is something of everything.
    waiting, done = sorted(todo.items(), key=lambda item: item[1].seed), 0
    if processes == 1:
        while waiting and allowed():
            name, run = waiting.pop(0)
            done += 1
            print(f"{done}/{len(todo)} {_carry_out_one(run, output / name, device, directories)}", flush=True)
        return len(waiting)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        going: set[Future[str]] = set()
        while going or (waiting and allowed()):
            while waiting and len(going) < processes and allowed():
                name, run = waiting.pop(0)
                going.add(pool.submit(_carry_out_one, run, output / name, device, directories))
            finished, going = wait(going, return_when=FIRST_COMPLETED)
            for future in finished:
                done += 1
                print(f"{done}/{len(todo)} {future.result()}", flush=True)
    return len(waiting)


def _carry_out_one(run: Run, path: Path, device: torch.device, directories: dict[str, Path | None]) -> str:
    """Does a run and returns what to say of it."""
    torch.set_num_threads(1)
    begin, data_set = time.monotonic(), TASKS[run.task].images
    if run.engine == "single":
        images = load_images(data_set, directories.get(data_set)).to(device)
        write(run, train(run, images, device), device, path)
    else:
        distributed.start(run, path, directories.get(data_set))
    return f"{path.name} {time.monotonic() - begin:.1f} s"
