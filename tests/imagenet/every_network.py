"""One update and one validation of each of torchvision's networks at its own image size, and what they took.

    python -m tests.imagenet.every_network run FILE --seconds 500    # goes on where FILE (JSON lines) ends
    python -m tests.imagenet.every_network run FILE --names vit_b_16 vgg11
    python -m tests.imagenet.every_network table FILE                # for docs/reliability-tests.md

Each network is a process of its own, so that its memory can be told; those with few weights go first.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from arsg_dist.engine import Ranks, SingleProcessCommunicator
from arsg_dist.imagenet.config import DataConfig, OptimizerConfig, TrainConfig
from arsg_dist.imagenet.output import run_log
from arsg_dist.imagenet.output.weights import WeightFiles
from arsg_dist.imagenet.torchvision_compat import torchvision
from arsg_dist.imagenet.training import setup, trainer
from arsg_dist.imagenet.training.checkpoint import RunCheckpoints
from arsg_dist.imagenet.training.parts import Start

NAMES = torchvision.models.list_models(module=torchvision.models)
RESULTS = Path(__file__).parents[2] / "benchmarks/results/amd-epyc/networks.jsonl"
LIMIT = 420  # seconds for one of them


def own_size(name: str) -> int:
    """The side of the images that torchvision's untrained network is made for."""
    sizes: list[int] = [
        entry.transforms().crop_size[0] for entry in torchvision.models.get_model_weights(name)
    ]
    return 224 if name.startswith("vit_") else sizes[0]


def train_once(name: str, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make one update and one validation; what the run recorded of them."""
    config = TrainConfig(
        data=DataConfig(
            source="synthetic", synthetic_images=2, synthetic_classes=3, image_size=own_size(name), workers=0
        ),
        model=name,
        epochs=1,
        batch_size=2,
        val_batch_size=2,
        optimizer=OptimizerConfig(type="SGD", params={"lr": 1e-4}),
    )
    with (
        mock.patch.object(run_log, "draw_learning_curve", lambda directory: directory / "none"),
        mock.patch.object(RunCheckpoints, "save", return_value=None),  # of gigabytes
        mock.patch.object(WeightFiles, "save", return_value=None),
        mock.patch.object(trainer, "write_model_card", return_value=None),
    ):
        ranks = Ranks(0, 1, 0, "none")
        code = setup.train(config, Start("single", directory), ranks, SingleProcessCommunicator())
    assert code == 0
    train, epoch = (json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines())
    assert (train["update"], epoch["val_images"]) == (1, 2)
    assert 0.3 < train["loss"] < 12, train
    # Large, while batch norm's averages are those of one batch.
    assert math.isfinite(epoch["val_loss"]), epoch
    return train, epoch


def measure(name: str) -> dict[str, Any]:
    """Train in this process, once; what it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        train, epoch = train_once(name, Path(temporary) / "run")
    return {
        "size": own_size(name),
        "seconds": round(time.monotonic() - began, 1),
        "GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "loss": train["loss"],
        "val_loss": epoch["val_loss"],
    }


def _in_a_process_of_its_own(name: str) -> dict[str, Any]:
    """Measure in a process that has imported everything already."""
    here, there = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as log:
        process = multiprocessing.get_context("fork").Process(target=_measure_into, args=(there, log, name))
        process.start()
        there.close()
        if not here.poll(LIMIT):
            process.kill()
            process.join()
            return {"failed": f"not within {LIMIT} s"}
        try:
            result: dict[str, Any] = here.recv()
        except EOFError:
            result = {}
        process.join()
        log.seek(0)
        return result or {"failed": f"code {process.exitcode}: {log.read()[-2000:]}"}


def _measure_into(pipe: Any, log: Any, name: str) -> None:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    pipe.send(measure(name))


def weights_of(name: str) -> int:
    """How many a network has, as torchvision tells it."""
    counts: list[int] = [entry.meta["num_params"] for entry in torchvision.models.get_model_weights(name)]
    return max(counts)


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The last record of each network."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {record["network"]: record for record in map(json.loads, lines)}


def run(file: Path, names: list[str], seconds: float) -> int:
    """Train each of which FILE has no success; how many failed."""
    # What a run imports when it is used first, seconds of each process.
    import matplotlib.figure
    import torch.utils.tensorboard  # noqa: F401

    with tempfile.TemporaryFile() as picture:
        matplotlib.figure.Figure().savefig(picture)
    end, bad = time.monotonic() + seconds, 0
    for name in names or sorted(NAMES, key=weights_of):
        if "seconds" in read(file).get(name, {}) or time.monotonic() > end:
            continue
        record: dict[str, Any] = {"network": name, "torchvision": torchvision.__version__}
        record |= _in_a_process_of_its_own(name)
        bad += "failed" in record
        with file.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    return bad


def table(file: Path) -> str:
    records = read(file)
    done = [record for record in records.values() if "seconds" in record]
    slowest, largest = (max(done, key=lambda record: record[key]) for key in ("seconds", "GiB"))
    failed = [f"{name}: {record['failed']}" for name, record in records.items() if "failed" in record]
    return "\n".join(
        [
            f"{len(done)} of {len(NAMES)} networks made one update and one validation.",
            f"Longest: {slowest['network']}, {slowest['seconds']} s. "
            f"Most memory: {largest['network']}, {largest['GiB']} GiB.",
            *failed,
            *(f"{name}: not run" for name in NAMES if "seconds" not in records.get(name, {"seconds": 0})),
            *(f"{name}: not recorded" for name in NAMES if name not in records),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    several = commands.add_parser("run")
    several.add_argument("file", type=Path)
    several.add_argument("--names", nargs="*", choices=NAMES, default=[], metavar="NAME")
    several.add_argument("--seconds", type=float, default=math.inf, help="begin none after so many")
    commands.add_parser("table").add_argument("file", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        print(table(options.file))
        return 0
    return 1 if run(options.file, options.names, options.seconds) else 0


if __name__ == "__main__":
    raise SystemExit(main())
