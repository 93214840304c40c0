"""Train the track's network with each of some optimizers and seeds; one JSON-lines file per run.

    python -m benchmarks.nanogpt --data DIR --output runs/nanogpt --optimizers muon remote-muon --seeds 0 1 --steps 3250
    torchrun --nproc_per_node 8 -m benchmarks.nanogpt ...

A run that was interrupted goes on from its last validation, one that is done is not done again. `--minutes 9` stops at
the first validation after nine minutes, and starts no other run. README.md beside this has data, rules and settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common.machine import device_name
from benchmarks.nanogpt.data import Batches, shards, write_synthetic
from benchmarks.nanogpt.model import GPT, Size
from benchmarks.nanogpt.optimizers import OPTIMIZERS, WARMUP, make, set_learning_rates

TRACK_BATCH = 524_288
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """What makes two runs comparable; the defaults are the track's.

    Attributes:
        size: of the network.
        steps: updates of a run, which the learning rate comes down over.
        tokens: per update.
        time: length of a sequence.
        micro: sequences per forward pass.
        val_tokens: of validation.
        val_every: updates between two validations.
        warmup: updates in which the learning rate rises, for optimizers that have any.
        dtype: of the embedding and of what is computed.
        scale: factor on all learning rates.
    """

    size: Size
    steps: int
    tokens: int
    time: int
    micro: int
    val_tokens: int
    val_every: int
    warmup: int
    dtype: str
    scale: float


class Job:
    """The ranks of this job, or the one process, and its device."""

    def __init__(self) -> None:
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        )
        if cuda:
            torch.cuda.set_device(self.device)
        if self.ranks > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, number: float) -> float:
        """Return rank 0's number."""
        if self.ranks == 1:
            return number
        tensor = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return tensor.item()


class Run:
    """One optimizer with one seed.

    Args:
        job: the ranks.
        data: folder of shards.
        folder: of the run's records and its checkpoint.
        name: of the optimizer.
        seed: of the parameters' start; the order of the tokens is the files' own, as the track has it.
        settings: of it.
        compiled: whether the network is compiled.
    """

    def __init__(
        self, job: Job, data: Path, folder: Path, name: str, seed: int, settings: Settings, compiled: bool
    ) -> None:
        self.job, self.folder, self.name, self.settings = job, folder, name, settings
        self.model = GPT(settings.size, DTYPES[settings.dtype])
        self.model.start(seed)
        self.model.to(job.device)
        if compiled:
            self.model.compile(dynamic=False)
        self.optimizers = make(name, self.model, settings.scale)
        self.train = Batches(shards(data, "train"), settings.tokens, settings.time, job.rank, job.ranks)
        self.val = Batches(shards(data, "val"), settings.val_tokens, settings.time, job.rank, job.ranks)
        self.done = 0
        self.seconds = 0.0
        self.records: list[dict[str, Any]] = [self._head(seed)]
        self._resume()

    def _head(self, seed: int) -> dict[str, Any]:
        return {
            "kind": "run",
            "optimizer": self.name,
            "seed": seed,
            **asdict(self.settings),
            "ranks": self.job.ranks,
            "device": device_name(self.job.device.type),
            "torch": str(torch.__version__),
            "as_the_track": self.settings.tokens == TRACK_BATCH and self.settings.size == Size(),
        }

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        saved = torch.load(path, map_location=self.job.device, weights_only=True)
        ours = json.loads(json.dumps(self.records[0]))
        other = {key for key in ours if saved["records"][0].get(key) != ours[key]} - {
            "ranks",
            "device",
            "torch",
        }
        if other:
            raise ValueError(
                f"{path} is of a run with another {', '.join(sorted(other))}: choose another --output"
            )
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.done, self.seconds, self.records = saved["done"], saved["seconds"], saved["records"]

    def _save(self) -> None:
        """Write the records, and the checkpoint unless the run is over; each replaces the last one whole."""
        if self.job.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part, checkpoint = self.folder / "part", self.folder / "checkpoint.pt"
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "done": self.done,
            "seconds": self.seconds,
            "records": self.records,
        }
        torch.save(state, part)
        part.replace(checkpoint)
        part.write_text("".join(json.dumps(record) + "\n" for record in self.records))
        part.replace(self.folder / "records.jsonl")
        if self.done == self.settings.steps:
            checkpoint.unlink()

    @torch.no_grad()
    def _val_loss(self) -> float:
        tokens, following = next(self.val.after(0))
        total = torch.zeros((), dtype=torch.float64, device=self.job.device)
        for x, y in zip(tokens.split(self.settings.micro), following.split(self.settings.micro), strict=True):
            total += self.model(x.to(self.job.device), y.to(self.job.device))
        return self.job.add(total).item() / self.settings.val_tokens

    def _validate(self) -> None:
        self.model.eval()
        record: dict[str, Any] = {"kind": "validation", "step": self.done, "val_loss": self._val_loss()}
        observers = [optimizer for optimizer in self.optimizers if hasattr(optimizer, "base_iterate")]
        if observers and self.done:
            with ExitStack() as stack:
                for optimizer in observers:
                    stack.enter_context(optimizer.base_iterate())
                record["val_loss_theta"] = self._val_loss()
        self.model.train()
        self.records.append({**record, "train_seconds": round(self.seconds, 3)})
        self._save()
        if self.job.rank == 0:
            print(
                "RESULT "
                + json.dumps({"optimizer": self.name, "seed": self.records[0]["seed"], **self.records[-1]})
            )
            sys.stdout.flush()

    def update(self, tokens: Tensor, following: Tensor) -> float:
        """Make one update; return the learning rate's factor."""
        micro = self.settings.micro
        for x, y in zip(tokens.split(micro), following.split(micro), strict=True):
            self.model(x.to(self.job.device), y.to(self.job.device)).backward()
        for param in self.model.parameters():
            assert param.grad is not None
            self.job.add(param.grad)  # the sum over all tokens, as the track has it
        warmup = WARMUP.get(self.name, self.settings.warmup)
        factor = set_learning_rates(self.optimizers, self.done, self.settings.steps, warmup)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return factor

    def carry_out(self, deadline: float) -> bool:
        """Train on; return whether it came to the end before the deadline, a time of `time.monotonic`."""
        if self.done == 0:
            self._validate()
        batches = self.train.after(self.done)
        while self.done < self.settings.steps:
            begin = time.perf_counter()
            until = min(self.done + self.settings.val_every, self.settings.steps)
            while self.done < until:
                self.update(*next(batches))
            if self.job.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - begin
            self._validate()
            if self.job.agree(time.monotonic() > deadline) and self.done < self.settings.steps:
                return False
        return True


def finished(folder: Path, steps: int) -> bool:
    """Tell whether a run's records reach its last update."""
    path = folder / "records.jsonl"
    return path.exists() and json.loads(path.read_text().splitlines()[-1]).get("step") == steps


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with *_train_*.bin and *_val_*.bin")
    parser.add_argument("--output", type=Path, default=Path("runs/nanogpt"), help="(default: %(default)s)")
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=["muon", "remote-muon"], metavar="NAME"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=math.inf, help="of all runs together")
    parser.add_argument("--lr-scale", type=float, default=1.0, help="factor on all learning rates")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument(
        "--synthetic", type=int, metavar="TOKENS", help="make --data, with so many tokens a file"
    )
    for name, number, text in (
        ("--steps", 3250, "updates of a run"),
        ("--tokens", TRACK_BATCH, "per update, over all ranks"),
        ("--time", 1024, "length of a sequence"),
        ("--micro", 64, "sequences per forward pass"),
        ("--val-tokens", 20 * TRACK_BATCH, "of validation"),
        ("--val-every", 125, "updates between two validations"),
        ("--warmup", 250, "updates, for optimizers without Muon"),
        ("--vocabulary", Size.vocabulary, "of the network"),
        ("--layers", Size.layers, "of the network"),
        ("--width", Size.width, "of the network"),
        ("--head", Size.head, "width of an attention head"),
    ):
        parser.add_argument(name, type=int, default=number, help=f"{text} (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Do the runs that are missing; return the exit code, 75 where time was up before all were done."""
    options = _options(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    job = Job()
    settings = Settings(
        size=Size(options.vocabulary, options.layers, options.width, options.head),
        scale=options.lr_scale,
        **{
            name: getattr(options, name)
            for name in ("steps", "tokens", "time", "micro", "val_tokens", "val_every", "warmup", "dtype")
        },
    )
    if options.synthetic and job.rank == 0 and not options.data.exists():
        write_synthetic(options.data, options.vocabulary, options.synthetic)
    if job.ranks > 1:
        dist.barrier()
    for seed in options.seeds:  # all optimizers of a seed before the next
        for name in options.optimizers:
            folder = options.output / f"{name}_seed{seed}"
            if job.agree(finished(folder, settings.steps)):
                continue
            if job.agree(time.monotonic() > deadline):
                return 75
            if not Run(job, options.data, folder, name, seed, settings, options.compile).carry_out(deadline):
                return 75
    return 0


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
