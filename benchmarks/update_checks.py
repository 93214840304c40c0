"""What comparing the ranks' settings costs: an update with and without, in turns, and their ratio.

Under DeepSpeed with everything else that is looked at before an update of an ARSG. Examples:

    mpirun -np 2 --bind-to none python -m benchmarks.update_checks horovod horovod-sharded
    torchrun --nproc-per-node 2 -m benchmarks.update_checks ddp fsdp
    deepspeed --num_accelerators 2 --module benchmarks.update_checks stage1 stage3
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

from arsg_dist import ARSG
from arsg_dist.engine import Engine, discover_ranks, end_process
from benchmarks.common.kept_results import this_command
from benchmarks.common.machine import device_name


def parsed() -> argparse.Namespace:
    """The command line."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument(
        "engines", nargs="+", help="horovod, horovod-sharded; or ddp, fsdp; or stage0 ... stage3"
    )
    parser.add_argument(
        "--layers", type=int, default=50, help="linear layers of the model (default: %(default)s)"
    )
    parser.add_argument("--width", type=int, default=256, help="of a layer (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=40, help="of each kind (default: %(default)s)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def built(name: str, model: nn.Sequential, communicator: Any) -> Engine:
    """An engine around a model."""
    settings = {"lr": 1e-6}
    if name.startswith("stage"):
        from arsg_dist.deepspeed import DeepSpeedEngine

        config = {
            "train_batch_size": communicator.world_size,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": int(name[-1]), "reduce_bucket_size": 1_000_000},
            "optimizer": {"type": "ARSG", "params": settings},
        }
        return DeepSpeedEngine(model, config, communicator)
    if name == "fsdp":
        from arsg_dist import fsdp

        fsdp.shard(model)
        return fsdp.FSDPEngine(model, ARSG(model.parameters(), **settings), communicator)
    if name == "ddp":
        from arsg_dist.ddp import DDPEngine

        return DDPEngine(model, ARSG(model.parameters(), **settings), communicator)
    from arsg_dist.horovod import HorovodEngine, HorovodShardedEngine

    kind = HorovodShardedEngine if name == "horovod-sharded" else HorovodEngine
    return kind(model, ARSG(model.parameters(), **settings), communicator)


def no_comparison(*_: Any) -> Any:
    """Begin nothing, and wait for nothing."""
    return lambda: None


@contextmanager
def no_settings(*_: Any) -> Iterator[None]:
    """Compare nothing during a block."""
    yield


@contextmanager
def without(name: str) -> Iterator[None]:
    """Updates as if nothing was compared."""
    if name.startswith("stage"):
        from arsg_dist.deepspeed.update_checks import UpdateChecks

        found = [mock.patch.object(UpdateChecks, method) for method in ("begin_update", "end_update")]
    elif name.startswith("horovod"):
        form = "sharded" if name.endswith("sharded") else "replicated"
        found = [mock.patch(f"arsg_dist.horovod.{form}.optimizer.same_settings", no_settings)]
    else:
        found = [mock.patch("arsg_dist.engine.local.start_comparison", no_comparison)]
    for patch in found:
        patch.start()
    try:
        yield
    finally:
        for patch in found:
            patch.stop()


def update(engine: Engine, inputs: torch.Tensor, *, check: bool, name: str) -> float:
    """Seconds of one update."""
    engine.communicator.barrier()
    with nullcontext() if check else without(name):
        begin = time.perf_counter()
        engine.backward(functional.mse_loss(engine.module(inputs), inputs))
        engine.step()
        next(engine.module.parameters())[..., :1].sum().item()  # has arrived
        engine.communicator.barrier()
        return time.perf_counter() - begin


def main() -> None:
    """Measures and prints a table, on rank 0."""
    options = parsed()
    if options.engines[0].startswith("stage"):
        from arsg_dist.deepspeed import connect
    elif options.engines[0].startswith("horovod"):
        from arsg_dist.horovod import connect
    else:
        from arsg_dist.ddp import connect
    communicator: Any = connect(discover_ranks())
    rows = []
    for name in options.engines:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(options.width, options.width) for _ in range(options.layers)))
        engine = built(name, model, communicator)
        inputs = torch.randn(16, options.width)
        for check in (True, False):
            update(engine, inputs, check=check, name=name)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.updates):
            for check in (True, False):
                times[check].append(update(engine, inputs, check=check, name=name))
        plain, checked = (1e3 * statistics.median(times[check]) for check in (False, True))
        ratio = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True))
        rows.append(f"| {name} | {plain:.1f} | {checked:.1f} | {ratio:.3f} |")
    if communicator.rank == 0:
        print(f"- device: {device_name('cpu')}; torch {torch.__version__}; {communicator.world_size} ranks")
        print(f"- {options.layers} layers of {options.width}²; medians of {options.updates} pairs of updates")
        print(f"- command: `{this_command()}`\n")
        print("| engine | update ms | with the comparison ms | ratio of neighbours |")
        print("|---|---|---|---|")
        print("\n".join(rows), flush=True)
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
