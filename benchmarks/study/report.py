"""Tables and pictures of the study; renews the generated parts of a document."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study import batch
from benchmarks.study.ledger import Ledger
from benchmarks.study.optimizers import FEW_BITS, OPTIMIZERS, TRIALS, Settings, at_edge, available
from benchmarks.study.paper.report import renewed
from benchmarks.study.plan import BITS, SEEDS, best_trials, ended_trials, ledger_of
from benchmarks.study.problem import Task
from benchmarks.study.statistics import Interval, detectable, paired, updates_to
from benchmarks.study.tasks import TASKS

BASE = "AdamW"
"""What the others are compared with."""


@dataclass(frozen=True)
class Row:
    """An optimizer's winner on a task, against tuned AdamW with the same seeds.

    Attributes:
        name: of the optimizer.
        settings: its winner's.
        runs: of its seeds.
        ended: how many did not diverge.
        difference: of the validation losses, negative where it is better; None unless all ended.
        share: of AdamW's updates until AdamW's last validation loss is reached; a seed that does not reach it counts as
            1, so the interval is a bound where `reached` is below the number of seeds.
        reached: how many seeds reach it.
    """

    name: str
    settings: Settings
    runs: list[dict[str, Any]]
    ended: int
    difference: Interval | None
    share: Interval | None
    reached: int

    def mean(self, key: str) -> float | None:
        """Return the mean of a result over the seeds; None if one lacks it."""
        values = [run.get(key) for run in self.runs]
        return None if None in values else sum(values) / len(values)

    @property
    def verdict(self) -> str:
        """Return what the difference says."""
        if self.name == BASE:
            return "–"
        if self.difference is None:
            return f"diverges on {len(self.runs) - self.ended} of {len(self.runs)} seeds"
        if not self.difference.differs:
            return "no difference"
        return "better" if self.difference.mean < 0 else "worse"


def rows_of(task: Task, ledger: Ledger) -> list[Row]:
    """Return the rows that are complete, by validation loss; none before AdamW's."""
    base = {run["seed"]: run for run in ledger.chosen(kind="seed", optimizer=BASE)}
    rows = []
    for name in available(task):
        runs = ledger.chosen(kind="seed", optimizer=name)
        if len(runs) < SEEDS or not {run["seed"] for run in runs} <= set(base):
            continue
        ended = [run for run in runs if run["val"] is not None]
        difference = share = None
        shares = [
            updates_to(run["curve"], base[run["seed"]]["curve"][-1], task.updates)
            if run["val"] is not None
            else None
            for run in runs
        ]
        if len(ended) == len(runs):
            difference = paired([run["val"] - base[run["seed"]]["val"] for run in runs])
            share = paired([(one if one is not None else task.updates) / task.updates for one in shares])
        reached = sum(one is not None for one in shares)
        rows.append(Row(name, runs[0]["settings"], runs, len(ended), difference, share, reached))
    return sorted(rows, key=lambda row: row.mean("val") if row.mean("val") is not None else float("inf"))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _share(row: Row, reached: bool = True) -> str:
    if row.name == BASE:
        return "100 %"
    if row.share is None or row.reached == 0:
        return "not reached"
    low, high = (max(0.0, min(1.0, end)) for end in (row.share.low, row.share.high))
    text = f"{100 * row.share.mean:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
    whole = row.reached == len(row.runs) or not reached
    return text if whole else f"{text}, {row.reached} of {len(row.runs)} seeds"


def _difference(row: Row) -> str:
    if row.name == BASE or row.difference is None:
        return "–"
    return _interval(row.difference)


def _interval(found: Interval, digits: int = 3) -> str:
    mean, low, high = (_number(value, digits, sign=True) for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"


def _settings(settings: Settings) -> str:
    names = {"weight_decay": "λ", "mu": "μ", "beta1": "β1", "beta2": "β2"}
    return ", ".join(f"{names.get(key, key)} {value:.3g}" for key, value in settings.items())


def task_table(task: Task, rows: list[Row]) -> str:
    """Return all that is known of a task, an optimizer a line."""
    head = ["", "updates to AdamW's loss", "validation loss", "against AdamW (95 %)", "", "training loss"]
    head += ["at half: x", "θ", "settings"]
    lines = []
    for row in rows:
        edge = (
            " (learning rate at the box's end)"
            if task.settings_of is None and at_edge(row.name, task, row.settings)
            else ""
        )
        lines.append(
            [
                row.name,
                _share(row),
                _number(row.mean("val")),
                _difference(row),
                row.verdict,
                *(_number(row.mean(key)) for key in ("train", "half", "half_theta")),
                _settings(row.settings) + edge,
            ]
        )
    return _table(head, lines)


def overview(studies: dict[str, list[Row]]) -> str:
    """Return optimizer × task: updates to AdamW's final validation loss; "" without tasks."""
    tasks = [TASKS[name] for name in studies]
    by_name = {task.name: {row.name: row for row in studies[task.name]} for task in tasks}
    marks = {"better": " **better**", "worse": " worse", "no difference": " no difference"}
    lines = []
    for name in OPTIMIZERS:
        cells = []
        for task in tasks:
            row = by_name[task.name].get(name)
            if row is None:
                cells.append("·")
            else:
                cells.append(
                    _share(row, reached=False)
                    + ("," + marks.get(row.verdict, f" {row.verdict}") if name != BASE else "")
                )
        if set(cells) != {"·"}:
            lines.append([name, *cells])
    return _table(["", *(task.short for task in tasks)], lines) if tasks else ""


def gain_by_batch(studies: dict[str, list[Row]], ledgers: dict[str, Ledger]) -> str:
    """Return what is gained over AdamW on the smallest GPT in batches of four sizes, and with which μ; "" for one."""
    columns = [name for name in studies if TASKS[name].table == "batch"]
    if len(columns) < 2:
        return ""
    rows = {name: {row.name: row for row in studies[name]} for name in columns}
    compared = [name for name in OPTIMIZERS if all(name in found for found in rows.values())]
    lines = [["AdamW's validation loss", *(_number(found[BASE].mean("val")) for found in rows.values())]]
    for name in compared[1:]:
        cells = [found[name] for found in rows.values()]
        lines.append([f"{name}: minus AdamW's", *(f"{_difference(row)}, {row.verdict}" for row in cells)])
        lines.append(["its updates to AdamW's loss", *(_share(row, reached=False) for row in cells)])
        if all("mu" in row.settings for row in cells):
            best = [best_trials(ledgers[task], name) for task in columns]
            mus = [sorted(trial["settings"]["mu"] for trial in trials) for trials in best]
            own = [f"{row.settings['mu']:.2g}" for row in cells]
            texts = [f"{mu} ({few[0]:.2g} to {few[-1]:.2g})" for mu, few in zip(own, mus, strict=True)]
            lines.append(["its μ (of the three best trials)", *texts])
    return _table(["", *(TASKS[name].short for name in columns)], lines)


def power_table(ledgers: dict[str, Ledger]) -> str:
    """Return which difference could be seen, from the pilots."""
    lines = []
    for name, ledger in ledgers.items():
        pilot = [ledger.chosen(kind="pilot", trial=half) for half in (0, 1)]
        values = [[run["val"] for run in half] for half in pilot]
        if min(map(len, values)) < 2 or None in values[0] + values[1]:
            continue
        differences = [b - a for a, b in zip(*values, strict=True)]
        rows = [row for row in rows_of(TASKS[name], ledger) if row.name != BASE and row.difference]
        seen = sorted((row.difference.high - row.difference.low) / 2 for row in rows if row.difference)
        lines.append(
            [
                TASKS[name].title,
                *(_number(detectable(differences, n)) for n in (5, 10, 20)),
                _number(seen[len(seen) // 2] if seen else None),
            ]
        )
    return _table(
        ["", "5 seeds", "10 seeds", "20 seeds", "afterwards: half of the intervals' width, median"], lines
    )


def batch_table(measured: list[dict[str, Any]]) -> str:
    """Return, for each batch size, the best learning rate and μ, which μ cost at most 5 % of loss, and the theory's."""
    rows: dict[tuple[str, float], list[str]] = {}
    for line in measured:
        losses = dict(zip(batch.MUS, line["losses"], strict=True))
        near = [mu for mu, loss in losses.items() if loss <= 1.05 * min(losses.values())]
        lr = line["lrs"][batch.MUS.index(line["mu"])]
        text = f"lr {lr:.2g}, μ {line['mu']:g} ({min(near):g} to {max(near):g})"
        if line.get("theory_mu") is not None:
            text += f"; {_number(line['theory_mu'], 2)}"
        rows.setdefault((line["preconditioner"], line["beta1"]), []).append(text)
    names = {"none": "RSG", "adam": "ARSG adam"}
    lines = [[f"{names[kind]}, β1 {beta1:g}", *texts] for (kind, beta1), texts in rows.items()]
    return _table(["", *(f"batch {size}" for size in batch.BATCHES)], lines)


def unfinished_table(ledgers: dict[str, Ledger]) -> str:
    """Return the trials of optimizers that have no row yet, which have the one seed of the tuning; "" for none."""
    lines = []
    for task, ledger in ((TASKS[name], ledger) for name, ledger in ledgers.items()):
        best = _trial_losses(ledger, BASE)
        whole = {row.name for row in rows_of(task, ledger)}
        for name in (name for name in available(task) if name not in whole):
            losses, done = _trial_losses(ledger, name), len(ledger.chosen(kind="trial", optimizer=name))
            if losses and best:
                below = f"{sum(loss < best[0] for loss in losses)} of {done}"
                lowest = [_number(values[0]) for values in (losses, best)]
                lines.append([f"{name}, {task.title}", f"{done} of {TRIALS}", *lowest, below])
    head = ["", "trials", "lowest validation loss", f"AdamW's lowest of {TRIALS}", "trials below that"]
    return _table(head, lines) if lines else ""


def _trial_losses(ledger: Ledger, name: str) -> list[float]:
    return [trial["val"] for trial in ended_trials(ledger, name)]


def bits_table(task: Task, ledger: Ledger) -> str:
    """Return what few bits of state cost each winner, against its own runs with the same seeds in float32."""
    lines = []
    for name, (base, _) in FEW_BITS.items():
        whole = {run["seed"]: run for run in ledger.chosen(kind="seed", optimizer=base)}
        runs = ledger.chosen(kind="seed", optimizer=name)
        if len(runs) < SEEDS:
            continue
        if any(run["val"] is None for run in runs):
            lines.append([name, base, "diverges", "–", "–", "–"])
            continue
        at = {key: paired([run[key] - whole[run["seed"]][key] for run in runs]) for key in ("val", "train")}
        differs = at["val"].differs
        verdict = ("better" if at["val"].mean < 0 else "worse") if differs else "no difference"
        val = _number(sum(run["val"] for run in runs) / len(runs))
        lines.append([name, base, val, _interval(at["val"], 4), verdict, _interval(at["train"], 4)])
    head = ["", "against float32 state of", "validation loss", "minus float32's (95 %)", "", "training loss"]
    return _table(head, lines)


def core_hours(ledger: Ledger) -> float:
    """Return what the runs of a task took."""
    return sum(record["seconds"] for record in ledger.records.values()) / 3600


def parts(results: Path) -> dict[str, str]:
    """Return the generated parts of a document.

    Raises:
        ValueError: there is no row beside AdamW's.
    """
    ledgers, studies = _read(results)
    budget = []
    for name, ledger in ledgers.items():
        lost = sum(record["val"] is None for record in ledger.records.values())
        budget.append([TASKS[name].title, len(ledger.records), lost, core_hours(ledger)])
    budget.append(["together", *(sum(line[column] for line in budget) for column in (1, 2, 3))])
    found = {
        "networks": overview(
            {name: rows for name, rows in studies.items() if TASKS[name].table == "networks"}
        ),
        "others": overview({name: rows for name, rows in studies.items() if TASKS[name].table == "others"}),
        "gain_by_batch": gain_by_batch(studies, ledgers),
        "power": power_table(ledgers),
        "batch_mu": batch_table(batch.read(results)),
        "budget": _table(
            ["", "runs", "of them diverged", "core-hours"],
            [[name, str(runs), str(lost), f"{hours:.2f}"] for name, runs, lost, hours in budget],
        ),
    }
    found["unfinished"] = unfinished_table(ledgers)
    if BITS in ledgers and any(ledgers[BITS].chosen(kind="seed", optimizer=name) for name in FEW_BITS):
        found["bits"] = bits_table(TASKS[BITS], ledgers[BITS])
    return {name: text for name, text in found.items() if text}


def write(results: Path, document: Path | None = None) -> None:
    """Write `TASK.md` for every task with rows, and `study.md`; draw the pictures; renew a document's parts.

    Args:
        results: of `run` and `batch`; tables go there too.
        document: Markdown file; pictures go to `images/study` beside it, else to the results.

    Raises:
        ValueError: there is no row beside AdamW's.
    """
    from benchmarks.study.figures import draw_differences, draw_learning

    ledgers, studies = _read(results)
    pictures = document.parent / "images/study" if document else results
    pictures.mkdir(parents=True, exist_ok=True)
    for name, rows in studies.items():
        text = f"# {TASKS[name].title}\n\n{task_table(TASKS[name], rows)}"
        (results / f"{name}.md").write_text(text)
    draw_differences(studies, pictures / "differences.png")
    draw_learning(studies, ledgers, pictures / "learning.png")
    generated = parts(results)
    everything = "\n".join(f"## {name}\n\n{part}" for name, part in generated.items())
    (results / "study.md").write_text(f"# Study\n\n{everything}")
    if document is not None:
        document.write_text(renewed(document.read_text(), generated))


def _read(results: Path) -> tuple[dict[str, Ledger], dict[str, list[Row]]]:
    ledgers = {name: ledger_of(results, task) for name, task in TASKS.items()}
    ledgers = {name: ledger for name, ledger in ledgers.items() if ledger.records}
    studies = {name: rows_of(TASKS[name], ledger) for name, ledger in ledgers.items()}
    studies = {name: rows for name, rows in studies.items() if len(rows) > 1}
    if not studies:
        raise ValueError(f"--results: no complete rows in {results}; `run` makes them")
    return ledgers, studies
