"""Does the best μ move with the batch? RSG and ARSG on the noisy quadratic, against the theory's quietest μ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arsg_dist import ARSG, theory
from benchmarks.study.ledger import environment

BATCHES = (1, 4, 16, 64)
MUS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9)
_RATES = tuple(0.02 * 2 ** (step / 2) for step in range(24))
_UPDATES, _SEEDS, _NOISE = 400, 16, 1.0
_KINDS = (("none", 0.9), ("none", 0.99), ("adam", 0.9))
_NAME = "batch.jsonl"


def measure(preconditioner: str, beta1: float) -> list[dict[str, Any]]:
    """Return for every batch size the loss at each μ with its best of 24 constant learning rates.

    All batch sizes and seeds are rows of one parameter, every (μ, learning rate) is a parameter group: an update is
    element by element, so none sees another.

    Returns:
        batch, losses (mean over seeds and the last tenth of the updates, by μ), lrs (the best, by μ), mu (the best),
        theory_mu (the quietest at the best learning rate).
    """
    curvature = torch.logspace(-3, 0, 100)
    generator = torch.Generator().manual_seed(29)
    start = torch.randn(_SEEDS, 100, generator=generator).expand(len(BATCHES), -1, -1)
    noise_of = _NOISE / torch.tensor(BATCHES, dtype=torch.float32).sqrt()[:, None, None]
    places = [(mu, lr) for mu in MUS for lr in _RATES]
    scale = 0.02 if preconditioner == "adam" else 1.0
    groups = [{"params": [nn.Parameter(start.clone())], "lr": lr * scale, "mu": mu} for mu, lr in places]
    optimizer = ARSG(groups, betas=(beta1, 0.99), preconditioner=preconditioner)  # type: ignore[arg-type]
    late = torch.zeros(len(places), len(BATCHES))
    first = _UPDATES * 9 // 10
    for update in range(_UPDATES):
        noise = noise_of * torch.randn(len(BATCHES), _SEEDS, 100, generator=generator)
        for number, group in enumerate(optimizer.param_groups):
            (x,) = group["params"]
            with torch.no_grad():
                if update >= first:
                    late[number] += (curvature * x**2).sum(-1).mean(-1) / 2 / (_UPDATES - first)
                x.grad = (curvature * x + noise).clamp(-1e15, 1e15)
        optimizer.step()
    late = late.nan_to_num(nan=math.inf)
    results = []
    for number, batch in enumerate(BATCHES):
        by_mu = late[:, number].view(len(MUS), len(_RATES))
        best = by_mu.argmin(1)
        losses = by_mu.gather(1, best[:, None]).flatten()
        lrs = [round(_RATES[int(place)] * scale, 6) for place in best]
        winner = int(losses.argmin())
        record: dict[str, Any] = {"preconditioner": preconditioner, "beta1": beta1, "batch": batch}
        record |= {"losses": [float(f"{loss:.5g}") for loss in losses], "lrs": lrs, "mu": MUS[winner]}
        if preconditioner == "none":
            record["theory_mu"] = round(_quietest(lrs[winner], beta1), 4)
        results.append(record)
    return results


def _quietest(lr: float, beta1: float) -> float:
    try:
        return float(theory.quietest_mu(lr * 1.0, beta1))  # the largest curvature is 1
    except ValueError:
        return math.nan  # diverges at μ = 0


def carry_out(results: Path) -> None:
    """Measure what is missing and write it."""
    path = results / _NAME
    lines = [{"env": environment()}]
    for preconditioner, beta1 in _KINDS:
        lines += measure(preconditioner, beta1)
        print(f"batch {preconditioner} {beta1} done", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n" for line in lines)
    )


def read(results: Path) -> list[dict[str, Any]]:
    """Return what was measured; empty if nothing was."""
    path = results / _NAME
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line for line in lines if "batch" in line]
