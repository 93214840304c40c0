"""Markdown tables of the studies."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.study.paper.curves import Curve, by_label, share_of_updates, spread
from benchmarks.study.paper.study import Study

BASELINE = "ADAM"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(study: Study, curves: list[Curve]) -> str:
    """Final losses and accuracies, and how soon ADAM's final training loss is reached."""
    groups = by_label(curves)
    baseline = {curve.run.seed: curve for curve in groups.get(BASELINE, []) if not curve.diverged}
    rows = []
    for label, runs in groups.items():
        fine = [curve for curve in runs if not curve.diverged]
        count = str(len(runs)) + (f", {len(runs) - len(fine)} diverged" if len(fine) < len(runs) else "")
        if not fine:
            rows.append([label, count, *["diverged"] * 3, "–"])
            continue
        rows.append(
            [
                label,
                count,
                spread([curve.train_loss for curve in fine], _loss),
                spread([curve.epochs[-1]["val_loss"] for curve in fine], _loss),
                spread([curve.epochs[-1]["val_accuracy"] for curve in fine], _percent),
                _shares(fine, baseline),
            ]
        )
    head = ["", "seeds", "training loss", "validation loss", "validation accuracy"]
    return _rows([*head, f"updates to reach {BASELINE}'s final training loss"], rows)


def _shares(curves: list[Curve], baseline: dict[int, Curve]) -> str:
    shares = [
        share_of_updates(curve, baseline[curve.run.seed]) for curve in curves if curve.run.seed in baseline
    ]
    reached = [share for share in shares if share is not None]
    if not shares:
        return "–"
    if not reached:
        return "not reached"
    note = "" if len(reached) == len(shares) else f", {len(reached)} of {len(shares)} seeds"
    return spread(reached, lambda share: f"{share:.0%}") + note


def variants(study: Study, curves: list[Curve]) -> str:
    """The same columns for named variants."""
    return table(study, curves)


def paired(study: Study, curves: list[Curve]) -> str:
    """The same columns, then what every variant differs by from the first, seed by seed."""
    groups = by_label(curves)
    first = next(iter(groups))
    base = {curve.run.seed: curve for curve in groups[first]}
    rows = []
    for label, runs in groups.items():
        pairs = [(curve, base[curve.run.seed]) for curve in runs if curve.run.seed in base and label != first]
        if pairs and not any(curve.diverged for pair in pairs for curve in pair):
            losses = [one.train_loss - other.train_loss for one, other in pairs]
            validated = [one.epochs[-1]["val_loss"] - other.epochs[-1]["val_loss"] for one, other in pairs]
            shares = [
                one.epochs[-1]["val_accuracy"] - other.epochs[-1]["val_accuracy"] for one, other in pairs
            ]
            rows.append([label, str(len(pairs)), _mean(losses), _mean(validated), _mean(shares, 100)])
    head = [f"minus {first}", "seeds", "training loss", "validation loss", "validation accuracy, points"]
    return (
        f"{table(study, curves)}\n\nDifferences of runs with the same seed, mean ± standard error:\n\n"
        f"{_rows(head, rows)}"
    )


def _mean(values: list[float], factor: float = 1.0) -> str:
    scaled = [factor * value for value in values]
    error = statistics.stdev(scaled) / len(scaled) ** 0.5 if len(scaled) > 1 else float("nan")
    return f"{statistics.fmean(scaled):+.4f} ± {error:.4f}"


def sensitivity(study: Study, curves: list[Curve]) -> str:
    """What each optimizer reached with the same number of trials."""
    rows = []
    for label, runs in by_label(curves).items():
        points: dict[str, list[Curve]] = {}
        for curve in runs:
            points.setdefault(repr(curve.run.settings), []).append(curve)
        results = sorted(
            (
                statistics.median(float("inf") if curve.diverged else curve.train_loss for curve in at_point),
                max(curve.epochs[-1]["val_accuracy"] for curve in at_point),
                ", ".join(f"{key} {value:g}" for key, value in at_point[0].run.settings.items()),
            )
            for at_point in points.values()
        )
        best = results[0][0]
        near = [sum(loss <= share * best for loss, *_ in results) for share in (1.05, 1.2)]
        rows.append(
            [
                label,
                str(len(results)),
                _loss(best),
                results[0][2],
                _percent(max(accuracy for _, accuracy, _ in results)),
                _loss(statistics.median(loss for loss, *_ in results)),
                *(f"{count} of {len(results)}" for count in near),
            ]
        )
    head = ["", "trials", "best training loss", "at", "best validation accuracy", "median training loss"]
    return _rows([*head, "within 5 % of its best", "within 20 %"], rows)


def batches(study: Study, curves: list[Curve]) -> str:
    """Final training loss over batch size, for each way to scale lr."""
    sizes = study.settings["batch_sizes"]
    rows = []
    for label, runs in by_label(curves).items():
        for scaling in study.settings["lr_scaling"]:
            row = [label, scaling]
            for size in sizes:
                there = [
                    curve
                    for curve in runs
                    if curve.run.batch == size
                    and (curve.run.lr_scaling == scaling or curve.run.batch_size is None)
                ]
                fine = [curve.train_loss for curve in there if not curve.diverged]
                row.append(spread(fine, _loss) if fine else "diverged" if there else "–")
            rows.append(row)
    return _rows(["", "lr scaled", *(f"batch {size:,}" for size in sizes)], rows)


def engines(study: Study, curves: list[Curve]) -> str:
    """How far the curve of a job lies from that of one process with as many micro-batches."""
    single = {(c.label, c.run.ranks, c.run.seed): c for c in curves if c.run.engine == "single"}
    rows = []
    for curve in curves:
        reference = single.get((curve.label, curve.run.ranks, curve.run.seed))
        if curve.run.engine == "single" or reference is None:
            continue
        gaps = [abs(a - b) / b for a, b in zip(curve.losses, reference.losses, strict=True)]
        rows.append(
            [
                curve.label,
                curve.run.engine,
                str(curve.run.ranks),
                str(len(gaps)),
                f"{max(gaps):.1e}",
                f"{curve.train_loss:.6f}",
                f"{reference.train_loss:.6f}",
                _percent(curve.epochs[-1]["val_accuracy"]),
                _percent(reference.epochs[-1]["val_accuracy"]),
            ]
        )
    head = ["", "engine", "ranks", "updates", "largest relative difference of a batch's loss"]
    head += ["training loss", "of one process", "validation accuracy", "of one process"]
    return _rows(head, rows)


def theta(study: Study, curves: list[Curve]) -> str:
    """Validation at x and at θ, at some epochs."""
    rows = []
    for label, runs in by_label(curves).items():
        count = min(len(curve.epochs) for curve in runs)
        for epoch in sorted({1, max(1, count // 4), max(1, count // 2), count}):
            records = [curve.epochs[epoch - 1] for curve in runs]
            row = [label, str(epoch), str(len(runs))]
            for key, shown in (("val_loss", _loss), ("val_accuracy", _percent)):
                row += [spread([r[key + at] for r in records], shown) for at in ("", "_theta")]
            rows.append(row)
    head = ["", "epoch", "seeds", "validation loss at x", "at θ", "validation accuracy at x", "at θ"]
    return _rows(head, rows)


TABLES: dict[str, Callable[[Study, list[Curve]], str]] = {
    "table": table,
    "variants": variants,
    "paired": paired,
    "map": sensitivity,
    "batch": batches,
    "engines": engines,
    "theta": theta,
}
"""Kind of study → its table."""
