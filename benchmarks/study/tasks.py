"""Name → task, the smallest first."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study.images import Logistic
from benchmarks.study.known import Factorisation, Quadratic
from benchmarks.study.problem import Problem, Task
from benchmarks.study.text import TextProblem

_NETWORK = {"adam": 8e-3, "lion": 2e-3, "muon": 3e-2, "sgd": 2.0}
_LEADING = (
    "AdamW",
    "RemoteObservation(AdamW)",
    "ARSG adam",
    "ARSG",
    "NAdamW",
    "QHAdam",
    "Schedule-Free AdamW",
    "Lion",
)


def _gpt_small(seed: int, data: Path | None) -> Problem:
    return TextProblem(seed, data, width=64, layers=2, length=32, sequences=8)


def _gpt_middle(seed: int, data: Path | None) -> Problem:
    return TextProblem(seed, data, width=96, layers=3, length=64, sequences=8)


def _quadratic(seed: int, data: Path | None) -> Problem:
    return Quadratic(seed, noise=0.3)


def _factorisation(seed: int, data: Path | None) -> Problem:
    return Factorisation(seed)


def _logistic(seed: int, data: Path | None) -> Problem:
    return Logistic(seed, data, "mnist_logistic")


def _digits(seed: int, data: Path | None) -> Problem:
    return Logistic(seed, data, "digits_logistic")


TASKS = {
    task.name: task
    for task in (
        Task("gpt-0.1M", "GPT, 0.11 M parameters, Shakespeare", _gpt_small, 160, _NETWORK, clip=1.0),
        Task(
            "quadratic",
            "noisy quadratic",
            _quadratic,
            250,
            {"adam": 3e-2, "lion": 1e-2, "sgd": 1.0},
            exact=True,
        ),
        Task(
            "factorisation",
            "matrix factorisation",
            _factorisation,
            250,
            {"adam": 3e-2, "lion": 1e-2, "muon": 5e-2, "sgd": 2.0},
            exact=True,
        ),
        Task(
            "logistic",
            "MNIST, logistic regression, 2 epochs",
            _logistic,
            468,
            {"adam": 1e-2, "lion": 1e-3, "sgd": 1.0},
        ),
        Task(
            "gpt-0.4M",
            "GPT, 0.35 M parameters, Shakespeare, settings of the smaller",
            _gpt_middle,
            320,
            _NETWORK,
            clip=1.0,
            settings_of="gpt-0.1M",
            optimizers=_LEADING,
        ),
        Task("digits", "digits, logistic regression", _digits, 25, {"adam": 1e-2, "lion": 1e-3, "sgd": 1.0}),
    )
}
"""`digits` is for tests: it needs no data and is over in a moment."""
