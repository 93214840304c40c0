"""`arsg-imagenet train` with a signal at a known update and a record of what each rank was given.

Environment: ARSG_TEST_SIGNAL="UPDATES RANK SIGNAL TARGET" sends SIGNAL after so many updates of this start from RANK to
itself (TARGET "self", or "self-twice": again when it is another keystroke); ARSG_TEST_KEYS is a directory for the
images of every micro-batch, one file per rank; ARSG_TEST_FAULTS is JSON for `fault_points.install`;
ARSG_TEST_SMALL_NETWORK makes resnet20 a `SmallResNet`;
ARSG_TEST_COMPILE_BACKEND is the backend of torch.compile.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

from torch import nn

from arsg_dist.engine import discover_ranks, end_process
from arsg_dist.imagenet import models
from arsg_dist.imagenet.cli import train_command
from arsg_dist.imagenet.data.sampler import SampleKey, TrainingSampler
from arsg_dist.imagenet.training.optimization import Schedules
from tests.imagenet.jobs.small_network import SmallResNet


def send_at(updates: int, number: signal.Signals, target: str) -> None:
    done = 0
    real = Schedules.after_update

    def after_update(self: Schedules) -> None:
        nonlocal done
        real(self)
        done += 1
        if done == updates:
            print(f"sending {number.name} to {target}", flush=True)
            os.kill(os.getpid(), number)
            if target == "self-twice":
                time.sleep(1.2)
                os.kill(os.getpid(), number)
                time.sleep(20)  # until it is heard, which another thread does

    Schedules.after_update = after_update  # type: ignore[method-assign]


def record(path: Path) -> None:
    real = TrainingSampler.__iter__

    def recorded(self: TrainingSampler) -> Iterator[list[SampleKey]]:
        with path.open("w") as file:
            for keys in real(self):
                file.write(json.dumps(keys) + "\n")
                file.flush()
                yield keys

    TrainingSampler.__iter__ = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    ranks = discover_ranks()
    if "ARSG_TEST_SIGNAL" in os.environ:
        updates, rank, name, target = os.environ["ARSG_TEST_SIGNAL"].split()
        if ranks.rank == int(rank):
            send_at(int(updates), signal.Signals[name], target)
    if "ARSG_TEST_KEYS" in os.environ:
        record(Path(os.environ["ARSG_TEST_KEYS"]) / f"rank-{ranks.rank}.jsonl")
    if "ARSG_TEST_SMALL_NETWORK" in os.environ:
        models.ResNet20 = SmallResNet  # type: ignore[misc]
    if "ARSG_TEST_FAULTS" in os.environ:
        from tests.support import fault_points

        faults = [
            fault
            for fault in json.loads(os.environ["ARSG_TEST_FAULTS"])
            if fault["rank"] in (ranks.rank, "all")
        ]
        fault_points.install(faults, Path(os.devnull))
    if "ARSG_TEST_COMPILE_BACKEND" in os.environ:
        nn.Module.compile = partialmethod(  # type: ignore[method-assign, assignment]
            nn.Module.compile, backend=os.environ["ARSG_TEST_COMPILE_BACKEND"]
        )
    end_process(train_command(sys.argv[1:]))
