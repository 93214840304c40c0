"""Which runs a task's study has, and doing those that are missing."""

from __future__ import annotations

import math
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
_RUNOFF, _RUNOFF_TRIALS = range(801, 804), 3


def ledger_of(results: Path, task: Task) -> Ledger:
    """Return the results of a task."""
    return Ledger(results / f"{task.name}.jsonl")


def ended_trials(ledger: Ledger, name: str) -> list[Record]:
    """Return the trials that did not diverge, the one with the lowest validation loss at its end first."""
    ended = [trial for trial in ledger.chosen(kind="trial", optimizer=name) if trial["val"] is not None]
    return sorted(ended, key=lambda trial: trial["val"])


def best_trials(ledger: Ledger, name: str) -> list[Record]:
    """Return the first three of these."""
    return ended_trials(ledger, name)[:_RUNOFF_TRIALS]


def winner(task: Task, ledger: Ledger, name: str) -> Settings | None:
    """Return the settings of the best trial; None before all trials, and runs of the runoff, are done.

    The best is the one with the lowest validation loss at its end; with `runoff`, of the three best, the one with the
    lowest mean over three other seeds.
    """
    best = best_trials(ledger, name)
    if len(ledger.chosen(kind="trial", optimizer=name)) < TRIALS or not best:
        return None
    if not task.runoff:
        return best[0]["settings"]
    sums = []
    for trial in best:
        runs = ledger.chosen(kind="runoff", optimizer=name, trial=trial["trial"])
        if len(runs) < len(_RUNOFF):
            return None
        sums.append(sum(run["val"] if run["val"] is not None else math.inf for run in runs))
    return best[sums.index(min(sums))]["settings"]


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
            yield from _missing_of_runoff(task, ledger_of(results, task), name)
            best = winner(task, ledger_of(results, task), name)
        else:
            source = TASKS[task.settings_of]
            best = winner(source, ledger_of(results, source), name)
        for seed in range(1, seeds + 1):
            record = {"kind": "seed", "optimizer": name, "seed": seed}
            if best is not None and record not in ledger:
                yield record | {"settings": best}


def _missing_of_runoff(task: Task, ledger: Ledger, name: str) -> Iterator[Record]:
    if not task.runoff or len(ledger.chosen(kind="trial", optimizer=name)) < TRIALS:
        return
    for trial in best_trials(ledger, name):
        for seed in _RUNOFF:
            record = {"kind": "runoff", "optimizer": name, "trial": trial["trial"], "seed": seed}
            if record not in ledger:
                yield record | {"settings": trial["settings"]}


def missing_in_few_bits(task: Task, results: Path, names: list[str] | None = None) -> Iterator[Record]:
    """Yield the runs of winners with few bits of state that are missing; their seeds are the winners'."""
    ledger = ledger_of(results, task)
    for name, (base, _) in FEW_BITS.items():
        best = winner(task, ledger, base)
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
        curve = record["kind"] in ("pilot", "seed")
        outcome = train(task, record["optimizer"], record["settings"], record["seed"], data, curve)
        ledger.append(record | outcome)
        done += 1
        which = f"trial {record['trial']}" if "trial" in record else f"seed {record['seed']}"
        print(
            f"{task.name} {record['kind']} {record['optimizer']} {which}: {outcome['val']} in {outcome['seconds']} s",
            flush=True,
        )
    return done
