"""Which runs a task's study has, and doing those that are missing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.study.ledger import Ledger, Record
from benchmarks.study.optimizers import FEW_BITS, TRIALS, Settings, available, trial_settings
from benchmarks.study.problem import Task
from benchmarks.study.tasks import TASKS
from benchmarks.study.trial import train

SEEDS = 10
"""Of a winner; other numbers than the one seed of the trials."""
BITS = "gpt-0.1M"
"""The task on which few bits of state are tried."""
_PILOT = range(901, 906)


def ledger_of(results: Path, task: Task) -> Ledger:
    """Return the results of a task."""
    return Ledger(results / f"{task.name}.jsonl")


def winner(ledger: Ledger, name: str) -> Settings | None:
    """Return the settings of the trial with the lowest validation loss at its end; None before all trials are done."""
    trials = ledger.chosen(kind="trial", optimizer=name)
    ended = [trial for trial in trials if trial["val"] is not None]
    if len(trials) < TRIALS or not ended:
        return None
    return min(ended, key=lambda trial: trial["val"])["settings"]


def missing(
    task: Task, results: Path, names: list[str] | None = None, seeds: int = SEEDS
) -> Iterator[Record]:
    """Yield what is to be run next, read from the results each time: kind, optimizer, seed, settings, trial.

    First the pilot, which says how large a difference can be seen; then every optimizer's trials and its winner's
    seeds, one optimizer after the other.
    """
    ledger = ledger_of(results, task)
    ordered = [name for name in names or available(task) if name in available(task)]
    if task.settings_of is None:
        middle = trial_settings("AdamW", task, 0) | {"lr": task.lr["adam"] / 2, "beta1": 0.9, "beta2": 0.99}
        for half, settings in enumerate((middle, middle | {"lr": task.lr["adam"] / 4})):
            for seed in _PILOT:
                record = {"kind": "pilot", "optimizer": "AdamW", "trial": half, "seed": seed}
                if record not in ledger:
                    yield record | {"settings": settings}
    for name in ordered:
        if task.settings_of is None:
            for trial in range(TRIALS):
                record = {"kind": "trial", "optimizer": name, "trial": trial, "seed": 0}
                if record not in ledger:
                    yield record | {"settings": trial_settings(name, task, trial)}
            best = winner(ledger_of(results, task), name)
        else:
            best = winner(ledger_of(results, TASKS[task.settings_of]), name)
        for seed in range(1, seeds + 1):
            record = {"kind": "seed", "optimizer": name, "seed": seed}
            if best is not None and record not in ledger:
                yield record | {"settings": best}


def missing_in_few_bits(task: Task, results: Path, names: list[str] | None = None) -> Iterator[Record]:
    """Yield the runs of winners with few bits of state that are missing; their seeds are the winners'."""
    ledger = ledger_of(results, task)
    for name, (base, _) in FEW_BITS.items():
        best = winner(ledger, base)
        for seed in range(1, SEEDS + 1):
            record = {"kind": "seed", "optimizer": name, "seed": seed}
            if best is not None and (not names or name in names) and record not in ledger:
                yield record | {"settings": best}


def carry_out(
    task: Task,
    results: Path,
    data: Path | None,
    names: list[str] | None = None,
    seeds: int = SEEDS,
    minutes: float | None = None,
    few_bits: bool = False,
) -> int:
    """Do the runs of a task that are missing, in this process; with `few_bits` those of winners with such a state.

    Returns:
        How many were done.
    """
    ledger, done, begin = ledger_of(results, task), 0, time.monotonic()
    wanted = missing_in_few_bits(task, results, names) if few_bits else missing(task, results, names, seeds)
    for record in wanted:
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            break
        outcome = train(
            task, record["optimizer"], record["settings"], record["seed"], data, record["kind"] != "trial"
        )
        ledger.append(record | outcome)
        done += 1
        which = f"trial {record['trial']}" if "trial" in record else f"seed {record['seed']}"
        print(
            f"{task.name} {record['kind']} {record['optimizer']} {which}: {outcome['val']} in {outcome['seconds']} s",
            flush=True,
        )
    return done
