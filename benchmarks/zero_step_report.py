"""The tables of zero_step.py."""

from __future__ import annotations

import statistics
from typing import Any

from kept_results import KeptResults
from workloads import WORKLOADS

BASELINE = "DeepSpeed Adam"
PEERS = {
    "ARSG": 36,
    "ARSG, plain torch": 36,
    BASELINE: 28,
    "torch AdamW": 28,
    "torch AdamW, plain": 28,
    "torch Adam(amsgrad)": 36,
}
"""Least memory traffic of the update, in bytes per fp32 parameter: x, g and the state read, x and the state written."""


def ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    """Median over rounds."""
    return statistics.median(a[key] / b[key] for a, b in zip(ours, theirs, strict=True))


def table(workload: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of Markdown for one model."""
    lines = [
        "| stage | ranks | optimizer | its own step ms | × DeepSpeed Adam | by bytes | update ms | × DeepSpeed Adam "
        "| whole step ms | × DeepSpeed Adam | state MB/rank | sent MB/rank and step | peak MB/rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, peers in sorted(results.items()):
        of_workload, stage, ranks = name.split("/")
        if of_workload == workload:
            for peer in PEERS:
                if peer in peers:
                    cells = [stage, ranks, *row(peer, peers[peer], peers[BASELINE])]
                    lines.append(f"| {' | '.join(cells)} |")
    return lines


def row(peer: str, rounds: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[str]:
    """The cells of one optimizer."""
    last = rounds[-1]
    cells = [f"{peer} ({last['class']})"]
    for key in ("optimizer", "update", "whole"):
        cells += [f"{statistics.median(r[key] for r in rounds):.1f}", f"{ratio(rounds, baseline, key):.2f}"]
        if key == "optimizer":
            cells.append(f"{PEERS[peer] / PEERS[BASELINE]:.2f}")
    cells += [f"{last['state'] / 1e6:.1f}", f"{sum(last['sent'].values()) / 1e6:.1f}"]
    return [*cells, f"{statistics.median(r['peak'] for r in rounds) / 1e6:.0f}"]


def report_of(kept: KeptResults) -> list[str]:
    """Lines of Markdown."""
    settings = kept.settings
    lines = [
        f"# Training step under ZeRO on {settings['device']}, {settings['precision']}"
        + (", optimizer state offloaded to the CPU" if settings["offload"] else ""),
        "",
        f"- device: {settings['machine']}",
        f"- torch {settings['torch']}; {settings['batch']} samples of side/length {settings['side']} per rank",
        f"- {settings['rounds']} engines per optimizer, {settings['steps']} timed steps each; medians; ratios are "
        "medians over rounds of ratios within a round",
        "- its own step: the optimizer's `step()` inside the update; by bytes: the ratio of the least memory traffic "
        "of the two; update: `engine.step()`, with the communication that belongs to it; sent: sizes that DeepSpeed's "
        "communication log counts in one step; peak: largest memory beyond what the process held before the model",
        *(f"- command: `{command}`" for command in kept.commands),
        "",
    ]
    for workload, description in WORKLOADS.items():
        rows = table(workload, kept.results)
        if len(rows) > 2:
            lines += [f"## {description.title}", "", *rows, ""]
    return lines
