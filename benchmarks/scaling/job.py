"""The rank's side of `measure`: times collectives and training steps once per rate of the links.

usage: job.py torch|horovod DIRECTORY

The ranks share the cores of one machine, so the passes of the model are emulated: each layer sleeps for a known time,
which needs no core; its products are too small to matter. What is measured is hence communication, its overlap with the
passes, and the engines' own work, not anybody's compute.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.emulated import SleepingLayer

RATES = (2000, 1000, 100)
"""Mbit/s of a cable."""
SIZES = (1 << 14, 1 << 20, 1 << 23)
"""Bytes of a collective: of the whole data, over all ranks."""
LAYERS, WIDTH = 8, 512
FORWARD, BACKWARD = 0.004, 0.008
"""Seconds that each layer sleeps."""
BUCKET = 1 << 21
"""Bytes that travel together; small beside the model, as usual."""


def model() -> torch.nn.Sequential:
    """The same 2.1 M parameters on every rank."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*(SleepingLayer(WIDTH, FORWARD, BACKWARD) for _ in range(LAYERS)))


Steps = dict[str, Callable[[], None]]


def torch_stack() -> tuple[Steps, Steps]:
    """Collectives over torch's gloo group, and a step of the engines ddp and fsdp and of ZeRO 1, 2 and 3."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import logger
    from torch.distributed.fsdp import fully_shard

    import arsg_dist.deepspeed
    from arsg_dist import ARSG
    from arsg_dist.ddp import DDPEngine, Shards
    from arsg_dist.engine import Engine, TorchCommunicator
    from arsg_dist.fsdp import FSDPEngine

    logger.setLevel("ERROR")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    arsg_dist.deepspeed.release_shared_memory()
    ranks = dist.get_world_size()
    collectives: Steps = {"barrier 0": dist.barrier}
    for size in SIZES:
        part = torch.zeros(size // 4 // ranks)
        whole = torch.zeros(part.numel() * ranks)
        collectives |= {
            f"all_reduce {size}": lambda whole=whole: dist.all_reduce(whole),
            f"reduce_scatter {size}": lambda part=part, whole=whole: dist.reduce_scatter_tensor(part, whole),
            f"all_gather {size}": lambda part=part, whole=whole: dist.all_gather_into_tensor(whole, part),
            f"all_to_all {size}": lambda whole=whole: dist.all_to_all_single(torch.empty_like(whole), whole),
        }
    inputs = torch.randn(4, WIDTH)
    communicator = TorchCommunicator(torch.device("cpu"))

    def on_torch(name: str) -> Callable[[], None]:
        network = model()
        engine: Engine
        if name == "fsdp":
            for unit in (*network, network):  # a layer of the emulation each; all ranks have the same weights
                fully_shard(unit)
            engine = FSDPEngine(network, ARSG(network.parameters(), lr=1e-6), communicator)
        else:
            bucket: Any = {"bucket_cap_mb": BUCKET / 2**20}
            shards = Shards(network.parameters(), **bucket) if name == "ddp-sharded" else None
            optimizer = ARSG(shards.groups if shards else network.parameters(), lr=1e-6, fused=True)
            engine = DDPEngine(network, optimizer, communicator, shards=shards, **({} if shards else bucket))

        def step() -> None:
            engine.backward(engine.module(inputs).square().mean())
            engine.step()

        return step

    def zero(stage: int) -> Callable[[], None]:
        network = model()
        engine, *_ = deepspeed.initialize(
            model=network, model_parameters=list(network.parameters()), config=zero_config(stage)
        )

        def step() -> None:
            engine.backward(engine(inputs).square().mean())
            engine.step()

        return step

    names = ("ddp", "ddp-sharded", "fsdp")
    return collectives, {name: on_torch(name) for name in names} | {
        f"zero{stage}": zero(stage) for stage in (1, 2, 3)
    }


def zero_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's defaults but for the bucket and for clipping."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "ARSG", "params": {"lr": 1e-6}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET // 4,
            "allgather_bucket_size": BUCKET // 4,
        },
    }


def horovod_stack() -> tuple[Steps, Steps]:
    """Collectives over Horovod's Gloo, and a step of replicated ARSG and of sharded ARSG, flat and two-level."""
    import horovod.torch as hvd

    from arsg_dist import ARSG
    from arsg_dist.engine import discover_ranks
    from arsg_dist.horovod import DistributedOptimizer, ShardedOptimizer, connect

    connect(discover_ranks())
    ranks = hvd.size()
    collectives: Steps = {"barrier 0": hvd.barrier}
    for size in SIZES:
        part = torch.zeros(size // 4 // ranks)
        whole = torch.zeros(part.numel() * ranks)
        collectives |= {
            f"all_reduce {size}": lambda t=whole, n=f"r{size}": hvd.allreduce_(t, name=n, op=hvd.Sum),
            f"all_to_all {size}": lambda t=whole, n=f"a{size}": hvd.alltoall(t, name=n),
            f"all_gather {size}": lambda t=part, n=f"g{size}": hvd.allgather(t, name=n),
        }
    inputs = torch.randn(4, WIDTH)

    def stepper(network: torch.nn.Module, optimizer: Any) -> Callable[[], None]:
        def step() -> None:
            network(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def replicated() -> Callable[[], None]:
        network = model()
        inner = ARSG(network.parameters(), lr=1e-6, fused=True)
        return stepper(
            network, DistributedOptimizer(inner, named_parameters=list(network.named_parameters()))
        )

    def sharded(group: str) -> Callable[[], None]:
        network = model()
        inner = ARSG(network.parameters(), lr=1e-6, fused=True)
        named = list(network.named_parameters())
        return stepper(
            network,
            ShardedOptimizer(inner, named_parameters=named, bucket_mb=BUCKET / 2**20, shard_group=group),
        )

    steps = {"horovod": replicated(), "horovod-sharded": sharded("job")}
    if hvd.local_size() > 1:
        steps["horovod-two-level"] = sharded("node")
    return collectives, steps


def per_call(call: Callable[[], None], barrier: Callable[[], None], least: float, most: int) -> list[float]:
    """Seconds per call, of three rows of calls; each row lasts `least` seconds or has `most` calls.

    Calls follow one another without a barrier, so that what one leaves in flight may overlap with the next.
    """
    barrier()
    begin = time.perf_counter()
    call()
    barrier()
    once = agreed(torch.tensor(time.perf_counter() - begin))
    count = 1 if once > least else max(2, min(most, int(least / once)))
    found = []
    for _ in range(3):
        barrier()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        barrier()
        found.append((time.perf_counter() - begin) / count)
    return found


def agreed(seconds: torch.Tensor) -> float:
    """Rank 0's figure on every rank: all must make the same calls."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(seconds, 0)
        return float(seconds)
    import horovod.torch as hvd

    return float(hvd.broadcast(seconds, 0, name="agreed"))


def job(stack: str, directory: Path) -> None:
    """Measures once per rate, whenever the driver has set it; rank 0 writes."""
    from arsg_dist.engine import discover_ranks, end_process

    torch.set_num_threads(1)
    collectives, steps = {"torch": torch_stack, "horovod": horovod_stack}[stack]()
    rank = discover_ranks().rank
    barrier = collectives["barrier 0"]
    for step in steps.values():
        step()
    barrier()
    (directory / f"ready{rank}").touch()
    for rate in RATES:
        wait_for(directory / f"go{rate}", 300)
        rows = []
        for kind, calls, least, most in (("collective", collectives, 0.3, 20), ("step", steps, 0.5, 5)):
            for name, call in calls.items():
                rows.append({"kind": kind, "name": name, "seconds": per_call(call, barrier, least, most)})
        if rank == 0:
            (directory / "partial").write_text(json.dumps(rows))
            (directory / "partial").rename(directory / f"done{rate}")
    barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    end_process(0)


def wait_for(path: Path, seconds: float, hopeless: Callable[[], bool] = lambda: False) -> None:
    """Returns when the file is there.

    Raises:
        TimeoutError: it does not come, or need not be waited for.
    """
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end or hopeless():
            raise TimeoutError(f"{path} did not appear within {seconds:g} s")
        time.sleep(0.05)


if __name__ == "__main__":
    job(sys.argv[1], Path(sys.argv[2]))
