"""Name → task, in the order of the tables."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.study.images import cifar_resnet, cifar_vit, of_the_paper
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


_gpt_small = partial(TextProblem, width=64, layers=2, length=32)


def _quadratic(seed: int, data: Path | None) -> Problem:
    return Quadratic(seed, noise=0.3)


def _factorisation(seed: int, data: Path | None) -> Problem:
    return Factorisation(seed)


def _larger_gpt(name: str, size: str, width: int, layers: int) -> Task:
    return Task(
        name,
        f"GPT, {size} parameters, Shakespeare, settings of the smallest",
        f"GPT, {size}, settings of the smallest",
        partial(TextProblem, width=width, layers=layers, length=64, sequences=8),
        320,
        _NETWORK,
        clip=1.0,
        settings_of="gpt-0.1M",
        optimizers=_LEADING,
    )


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
            partial(_gpt_small, sequences=8),
            160,
            _NETWORK,
            clip=1.0,
        ),
        _larger_gpt("gpt-0.4M", "0.35 M", width=96, layers=3),
        _larger_gpt("gpt-1.3M", "1.26 M", width=160, layers=4),
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
            # 64 images cost a quarter of the paper's 256
            partial(of_the_paper, name="mnist_cnn", batch=64, part=500, whole=5_000),
            300,
            {"adam": 4e-3, "lion": 1e-3, "sgd": 1.0},
            optimizers=_FOR_IMAGES,
        ),
        Task(
            "logistic",
            "MNIST, logistic regression, 2 epochs",
            "logistic regression, MNIST",
            partial(of_the_paper, name="mnist_logistic"),
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
            partial(of_the_paper, name="digits_logistic"),
            25,
            {"adam": 1e-2, "lion": 1e-3, "sgd": 1.0},
            table="others",
        ),
    )
}
"""`digits` is for tests: it needs no data and is over in a moment."""
