"""Name → task, in the order of the tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.study.images import cifar_resnet, cifar_vit, logistic, mnist_cnn
from benchmarks.study.known import Factorisation, Quadratic
from benchmarks.study.problem import Problem, Task
from benchmarks.study.text import TextProblem

_NETWORK = {"adam": 8e-3, "lion": 2e-3, "muon": 3e-2, "sgd": 2.0}
_LEADING = (
    "AdamW",
    "RemoteObservation(AdamW)",
    "ARSG adam",
    "ARSG",
    "Muon",
    "Schedule-Free AdamW",
    "RemoteObservation(Muon)",
    "NAdamW",
    "Lion",
)
_FOR_IMAGES = (
    "AdamW",
    "RemoteObservation(AdamW)",
    "ARSG adam",
    "ARSG",
    "SGD",
    "Muon",
    "Schedule-Free AdamW",
    "RemoteObservation(Muon)",
    "RSG",
)


def _gpt_small(seed: int, data: Path | None, sequences: int = 8) -> Problem:
    return TextProblem(seed, data, width=64, layers=2, length=32, sequences=sequences)


def _gpt_middle(seed: int, data: Path | None) -> Problem:
    return TextProblem(seed, data, width=96, layers=3, length=64, sequences=8)


def _gpt_large(seed: int, data: Path | None) -> Problem:
    return TextProblem(seed, data, width=160, layers=4, length=64, sequences=8)


def _quadratic(seed: int, data: Path | None) -> Problem:
    return Quadratic(seed, noise=0.3)


def _factorisation(seed: int, data: Path | None) -> Problem:
    return Factorisation(seed)


def _logistic(seed: int, data: Path | None) -> Problem:
    return logistic(seed, data, "mnist_logistic")


def _digits(seed: int, data: Path | None) -> Problem:
    return logistic(seed, data, "digits_logistic")


def _gpt_in_batches_of(sequences: int) -> Task:
    return Task(
        f"gpt-0.1M-batch{sequences}",
        f"GPT, 0.11 M parameters, Shakespeare, batches of {32 * sequences:,} characters",
        f"{32 * sequences:,} characters",
        partial(_gpt_small, sequences=sequences),
        160,
        _NETWORK,
        clip=1.0,
        optimizers=("AdamW", "ARSG adam", "RemoteObservation(AdamW)"),
        runoff=True,
        table="batch",
    )


TASKS = {
    task.name: task
    for task in (
        Task(
            "gpt-0.1M",
            "GPT, 0.11 M parameters, Shakespeare",
            "GPT, 0.11 M",
            _gpt_small,
            160,
            _NETWORK,
            clip=1.0,
        ),
        Task(
            "gpt-0.4M",
            "GPT, 0.35 M parameters, Shakespeare, settings of the smallest",
            "GPT, 0.35 M, settings of the smallest",
            _gpt_middle,
            320,
            _NETWORK,
            clip=1.0,
            settings_of="gpt-0.1M",
            optimizers=_LEADING,
        ),
        Task(
            "gpt-1.3M",
            "GPT, 1.26 M parameters, Shakespeare, settings of the smallest",
            "GPT, 1.26 M, settings of the smallest",
            _gpt_large,
            320,
            _NETWORK,
            clip=1.0,
            settings_of="gpt-0.1M",
            optimizers=_LEADING,
        ),
        Task(
            "cifar-vit",
            "CIFAR-10 at 16 pixels, ViT, 0.1 M parameters",
            "ViT, CIFAR-10",
            cifar_vit,
            200,
            _NETWORK,
            clip=1.0,
            optimizers=_FOR_IMAGES,
        ),
        Task(
            "cifar-resnet20",
            "CIFAR-10 at 16 pixels, ResNet-20",
            "ResNet-20, CIFAR-10",
            cifar_resnet,
            200,
            {"adam": 4e-3, "lion": 1e-3, "sgd": 1.0},
            optimizers=_FOR_IMAGES,
        ),
        Task(
            "mnist-cnn",
            "MNIST, the paper's CNN, 300 updates",
            "the paper's CNN, MNIST",
            mnist_cnn,
            300,
            {"adam": 4e-3, "lion": 1e-3, "sgd": 1.0},
            optimizers=_FOR_IMAGES,
        ),
        Task(
            "logistic",
            "MNIST, logistic regression, 2 epochs",
            "logistic regression, MNIST",
            _logistic,
            468,
            {"adam": 1e-2, "lion": 1e-3, "sgd": 1.0},
            table="others",
        ),
        Task(
            "quadratic",
            "noisy quadratic",
            "noisy quadratic",
            _quadratic,
            250,
            {"adam": 3e-2, "lion": 1e-2, "sgd": 1.0},
            exact=True,
            table="others",
        ),
        Task(
            "factorisation",
            "matrix factorisation",
            "matrix factorisation",
            _factorisation,
            250,
            {"adam": 3e-2, "lion": 1e-2, "muon": 5e-2, "sgd": 2.0},
            exact=True,
            table="others",
        ),
        *(_gpt_in_batches_of(sequences) for sequences in (2, 8, 32, 128)),
        Task(
            "digits",
            "digits, logistic regression",
            "digits",
            _digits,
            25,
            {"adam": 1e-2, "lion": 1e-3, "sgd": 1.0},
            table="others",
        ),
    )
}
"""`digits` is for tests: it needs no data and is over in a moment."""
