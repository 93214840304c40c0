"""Images per second of training a classifier: loading, training on synthetic images, and both together.

Everything is measured in rounds, in random order within each, so that a load on the machine meets all; ratios are
medians over rounds of ratios within a round. Examples:

    python -m benchmarks.throughput --images imagenet-sample.tar --model resnet18 --batch 16 --side 64 --workers 1
    python -m benchmarks.throughput --images DIR/train --device cuda --precision bf16 --channels-last --batch 256 \
        --side 224 --workers 12 --steps 30

--images takes an ImageFolder tree (one directory per class) or a tar file with one in it; without it training on
synthetic images alone is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from arsg_dist import ARSG
from arsg_dist.imagenet.config import DataConfig
from arsg_dist.imagenet.data.dataset import loader, open_splits
from arsg_dist.imagenet.data.sampler import SampleKey
from arsg_dist.imagenet.data.transforms import normalised
from arsg_dist.imagenet.models import build_model
from arsg_dist.imagenet.torchvision_compat import torchvision, v2
from benchmarks.common.kept_results import machine_results, median_ratio, this_command, write_report
from benchmarks.common.machine import device_name

SETTINGS: dict[str, Any] = {"lr": 1e-6, "weight_decay": 1e-4, "fused": True}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "ARSG(fused)": lambda parameters: ARSG(parameters, mu=0.1, **SETTINGS),
    "SGD(momentum, fused)": lambda parameters: torch.optim.SGD(parameters, momentum=0.9, **SETTINGS),
    "Adam(amsgrad, fused)": lambda parameters: torch.optim.Adam(parameters, amsgrad=True, **SETTINGS),
    "AdamW(fused)": lambda parameters: torch.optim.AdamW(parameters, **SETTINGS),
}


def parsed() -> argparse.Namespace:
    """The command line."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="only optimizers whose name begins with one of these"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=64, help="of the images the network sees, pixels")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loading-batches", type=int, default=25, help="timed batches per loader and round")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per optimizer and round")
    parser.add_argument("--output", type=Path, help="Markdown file (default: benchmarks/results/...)")
    arguments = parser.parse_args()
    for name in [name for name in OPTIMIZERS if not name.startswith(tuple(arguments.only))]:
        del OPTIMIZERS[name]
    if not OPTIMIZERS:
        parser.error(f"--only {' '.join(arguments.only)} leaves no optimizer")
    return arguments


# Loading -------------------------------------------------------------------------------------------------------------


def tree_in(images: Path, scratch: Path) -> Path:
    """The ImageFolder tree in a directory or tar file, which is unpacked under `scratch`."""
    if images.is_file():
        with tarfile.open(images) as archive:
            archive.extractall(scratch)  # `filter` came with Python 3.11.4
        images = scratch
    while True:
        folders = sorted(path for path in images.iterdir() if path.is_dir())
        if any(path.is_file() for folder in folders for path in folder.iterdir()):
            return images
        if len(folders) != 1:
            raise SystemExit(f"{images} is no ImageFolder tree, nor a directory with one alone in it")
        images = folders[0]


def endless(one_pass: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Pass after pass; the first starts the worker processes."""
    while True:
        yield from one_pass()


def one_order(images: int, batches: int, batch: int) -> list[int]:
    """Indices for whole batches, permutation after permutation, the same for both loaders."""
    random_order, indices = random.Random(0), list[int]()
    while len(indices) < batches * batch:
        indices += random_order.sample(range(images), images)
    return indices[: batches * batch]


def our_batches(tree: Path, arguments: argparse.Namespace) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    """What `arsg-imagenet train` trains on, and the number of classes."""
    config = DataConfig(
        train_split=tree.name, val_split=tree.name, image_size=arguments.side, workers=arguments.workers
    )
    split, _ = open_splits(tree.parent, config, seed=0)
    indices = one_order(len(split), arguments.loading_batches, arguments.batch)
    order = [
        [SampleKey(0, index) for index in indices[start : start + arguments.batch]]
        for start in range(0, len(indices), arguments.batch)
    ]
    batches = loader(
        split,
        order,  # type: ignore[arg-type]
        workers=arguments.workers,
        image_size=arguments.side,
        pin_memory=arguments.device == "cuda",
    )
    device = torch.device(arguments.device)
    pairs = endless(
        lambda: ((normalised(batch.images.to(device, non_blocking=True)), batch.labels) for batch in batches)
    )
    return pairs, len(split.classes)


def plain_batches(tree: Path, arguments: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """torchvision's ImageFolder with the same transforms, in torch's DataLoader with the same workers."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(arguments.side),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    images = torchvision.datasets.ImageFolder(str(tree), transform)
    batches = torch.utils.data.DataLoader(
        torch.utils.data.Subset(images, one_order(len(images), arguments.loading_batches, arguments.batch)),
        batch_size=arguments.batch,
        num_workers=arguments.workers,
        multiprocessing_context="forkserver" if arguments.workers else None,
        persistent_workers=arguments.workers > 0,
        pin_memory=arguments.device == "cuda",
    )
    device = torch.device(arguments.device)
    return endless(lambda: ((images.to(device, non_blocking=True), labels) for images, labels in batches))


@dataclasses.dataclass
class Loading:
    """Loading alone, of one loader in one round.

    Attributes:
        rate: images/s.
        workers: CPU time of the loader processes per image, ms.
        idle: share of the time in which the loader processes did not compute.
        here: CPU time of the training process per image, ms.
    """

    rate: float
    workers: float
    idle: float
    here: float


def loading_rates(
    loaders: dict[str, Iterator[Any]], arguments: argparse.Namespace
) -> dict[str, list[Loading]]:
    """Each loader per round."""
    results: dict[str, list[Loading]] = {name: [] for name in loaders}
    processes: dict[str, list[psutil.Process]] = {}
    for name, batches in loaders.items():
        before = set(psutil.Process().children(recursive=True))
        next(batches)  # starts the processes
        processes[name] = list(set(psutil.Process().children(recursive=True)) - before)
    order = random.Random(0)
    count, images = arguments.loading_batches, arguments.loading_batches * arguments.batch
    for _ in range(arguments.rounds):
        for name in order.sample(list(loaders), len(loaders)):
            # What lies ready since the last round would count as made in no time; torch keeps 2 batches per process.
            for _ in islice(loaders[name], 2 * arguments.workers):
                pass
            begin = time.perf_counter(), cpu_of(processes[name]), time.process_time()
            for _ in islice(loaders[name], count):
                pass
            end = time.perf_counter(), cpu_of(processes[name]), time.process_time()
            whole, workers, here = (b - a for a, b in zip(begin, end, strict=True))
            idle = 1 - workers / (whole * arguments.workers) if arguments.workers else 0.0
            results[name].append(Loading(images / whole, 1000 * workers / images, idle, 1000 * here / images))
    return results


def cpu_of(processes: list[psutil.Process]) -> float:
    """CPU time so far of all of them, seconds."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


# Training ------------------------------------------------------------------------------------------------------------


class Trainer:
    """A network with one of the optimizers."""

    def __init__(self, name: str, num_classes: int, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, torch.device(arguments.device)
        torch.manual_seed(0)
        layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
        self.model: nn.Module = build_model(arguments.model, num_classes).to(self.device)
        self.model = self.model.to(memory_format=layout)  # type: ignore[call-overload]
        if arguments.compile:
            self.model.compile()
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.layout = layout
        enabled = arguments.precision == "bf16"
        self.autocast = torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=enabled)

    def steps(self, batches: Iterator[tuple[Tensor, Tensor]], count: int) -> tuple[float, float]:
        """Seconds of `count` steps, and of the optimizer in them."""
        update = 0.0
        events = []
        self.synchronize()
        begin = time.perf_counter()
        for images, labels in islice(batches, count):
            images = images.to(self.device, memory_format=self.layout, non_blocking=True)
            with self.autocast:
                logits = self.model(images)
            functional.cross_entropy(logits.float(), labels.to(self.device, non_blocking=True)).backward()
            # Events on a GPU: waiting for it here would slow the whole step down.
            if self.arguments.device == "cuda":
                pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                pair[0].record()
                self.optimizer.step()
                pair[1].record()
                events.append(pair)
            else:
                middle = time.perf_counter()
                self.optimizer.step()
                update += time.perf_counter() - middle
            self.optimizer.zero_grad()
        self.synchronize()
        whole = time.perf_counter() - begin
        return whole, update + sum(a.elapsed_time(b) for a, b in events) / 1000

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self.arguments.device == "cuda":
            torch.cuda.synchronize()


def training_rates(
    batches: dict[str, Iterator[tuple[Tensor, Tensor]]], num_classes: int, arguments: argparse.Namespace
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(source, optimizer) → per round images/s and the optimizer's share of the time."""
    trainers = {name: Trainer(name, num_classes, arguments) for name in OPTIMIZERS}
    cases = [(source, name) for source in batches for name in OPTIMIZERS]
    results: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
    order = random.Random(0)
    for number in range(1 + arguments.rounds):
        for source, name in order.sample(cases, len(cases)):
            whole, update = trainers[name].steps(batches[source], arguments.steps)
            if number:
                rate = arguments.steps * arguments.batch / whole
                results[(source, name)].append((rate, update / whole))
    return results


# Report --------------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def loading_line(name: str, rounds: list[Loading], peer: list[Loading]) -> str:
    """A line of the table about loading."""
    ratio = median_ratio([each.rate for each in rounds], [each.rate for each in peer])
    workers, idle, here = (
        statistics.median(getattr(each, kind) for each in rounds) for kind in ("workers", "idle", "here")
    )
    rates = spread([each.rate for each in rounds])
    return f"| {name} | {rates} | {ratio:.2f} | {workers:.2f} | {idle:.0%} | {here:.2f} |"


def report(
    loading: dict[str, list[Loading]],
    training: dict[tuple[str, str], list[tuple[float, float]]],
    files: int,
    load: str,
    arguments: argparse.Namespace,
) -> str:
    """The Markdown report."""
    lines = [
        f"# Training throughput on {arguments.device}: {arguments.model}, {arguments.side} × {arguments.side}, "
        f"batch {arguments.batch}, {arguments.precision}",
        "",
        f"- device: {device_name(arguments.device)}; {load}",
        f"- torch {torch.__version__}; {torch.get_num_threads()} threads; {arguments.workers} loader workers; "
        f"channels_last {arguments.channels_last}, compile {arguments.compile}",
        f"- {arguments.rounds} rounds; medians (range); ratios: median over rounds of the ratio within a round",
        f"- command: `{this_command()}`",
        "",
    ]
    if loading:
        ours, plain = loading.values()
        lines += [
            "## Loading alone: decode, RandomResizedCrop, flip, normalise, on the device",
            "",
            f"{files:,} JPEG files, read again and again and so from the page cache.",
            "",
            "| | images/s | × torchvision | loader processes: CPU ms per image | idle "
            "| training process: CPU ms per image |",
            "|---|---|---|---|---|---|",
            loading_line("arsg-imagenet's loader", ours, plain),
            loading_line("torchvision ImageFolder in a DataLoader", plain, plain),
            "",
        ]
    others = list(OPTIMIZERS)[1:]
    lines += [
        "## Training, one process",
        "",
        f"| images | optimizer | images/s | {' | '.join(f'× {name}' for name in others)} "
        "| optimizer's share of the step |",
        "|---|---|---|" + "---|" * (len(others) + 1),
    ]
    for (source, name), rounds in training.items():
        ratios = [
            median_ratio([rate for rate, _ in rounds], [rate for rate, _ in training[(source, peer)]])
            for peer in others
        ]
        lines.append(
            f"| {source} | {name} | {spread([rate for rate, _ in rounds])} "
            f"| {' | '.join(f'{ratio:.2f}' for ratio in ratios)} "
            f"| {statistics.median(share for _, share in rounds):.1%} |"
        )
    lines += [
        "",
        "Synthetic: the same batch in every step, on the device. From files: the whole pipeline, waiting for the "
        "loader included. The optimizer's share is that of `optimizer.step()`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures everything and writes the report."""
    arguments = parsed()
    before = os.getloadavg()[0]
    torch.backends.cudnn.benchmark = True  # as in a training with images of one size
    loading: dict[str, list[Loading]] = {}
    sources: dict[str, Iterator[Any]] = {}
    files, num_classes = 0, 1000
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.images:
            tree = tree_in(arguments.images, Path(scratch))
            files = sum(1 for path in tree.rglob("*") if path.is_file())
            ours, num_classes = our_batches(tree, arguments)
            loaders = {"ours": ours, "plain": plain_batches(tree, arguments)}
            loading = loading_rates(loaders, arguments)
            loaders["plain"].close()  # type: ignore[attr-defined]  # its workers would take cores from what follows
            sources["from files"] = ours
        layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(arguments.batch, 3, arguments.side, arguments.side, generator=generator)
        labels = torch.randint(num_classes, (arguments.batch,), generator=generator)
        batch = images.to(arguments.device, memory_format=layout), labels.to(arguments.device)
        sources = {"synthetic": endless(lambda: iter([batch]))} | sources
        training = training_rates(sources, num_classes, arguments)
    load = f"other load on the machine: 1-minute load average {before:.1f} before the start"
    text = report(loading, training, files, load, arguments)
    name = f"throughput/{arguments.model}_{arguments.precision}.md"
    write_report(arguments.output or machine_results(arguments.device) / name, text)


if __name__ == "__main__":
    main()
