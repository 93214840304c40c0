"""What comparing the ranks costs: an update of ResNet-50 with and without `check_replicas_every`'s check.

Updates with and without alternate. Example, under mpirun or horovodrun:

    mpirun -np 2 --bind-to none python -m benchmarks.replica_check --batch 8 --side 64
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch.nn import functional

from arsg_dist import ARSG
from arsg_dist.engine import SingleProcessEngine, check_replicas, discover_ranks, end_process
from arsg_dist.horovod import HorovodEngine, HorovodShardedEngine, connect
from benchmarks.common.kept_results import this_command
from benchmarks.common.machine import device_name
from benchmarks.common.workloads import resnet50


def parsed() -> argparse.Namespace:
    """The command line."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--batch", type=int, default=8, help="images per rank (default: %(default)s)")
    parser.add_argument("--side", type=int, default=64, help="of the images, pixels (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=8, help="of each kind (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def update(engine: SingleProcessEngine, images: torch.Tensor, labels: torch.Tensor, *, check: bool) -> float:
    """Seconds of one update."""
    engine.communicator.barrier()
    begin = time.perf_counter()
    if check:
        engine.check_next_sums()
    engine.backward(functional.cross_entropy(engine.module(images), labels))
    engine.step()
    if check:
        assert not engine.faulty_sums()
        check_replicas(engine.communicator, engine.replicated_tensors())
    next(engine.module.parameters())[..., :1].sum().item()  # has arrived
    engine.communicator.barrier()
    return time.perf_counter() - begin


def main() -> None:
    """Measures and prints a table, on rank 0."""
    options = parsed()
    ranks = discover_ranks()
    communicator = connect(ranks)
    device = torch.device(options.device, ranks.local_rank if options.device == "cuda" else None)
    rows = []
    for name, kind in (("horovod", HorovodEngine), ("horovod-sharded", HorovodShardedEngine)):
        torch.manual_seed(0)
        model = resnet50().to(device)
        engine = kind(model, ARSG(model.parameters(), lr=1e-6), communicator)
        images = torch.randn(options.batch, 3, options.side, options.side, device=device)
        labels = torch.randint(1000, (options.batch,), device=device)
        update(engine, images, labels, check=True)
        update(engine, images, labels, check=False)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.updates):
            for check in (True, False):
                times[check].append(update(engine, images, labels, check=check))
        plain, checked = (1e3 * statistics.median(times[check]) for check in (False, True))
        extra = checked - plain
        rows.append(
            f"| {name} | {plain:.0f} | {checked:.0f} | {extra:.0f} | {extra / plain:.0%} | {extra / plain / 100:.2%} |"
        )
    if communicator.rank == 0:
        print(f"- device: {device_name(options.device)}; torch {torch.__version__}; {ranks.world_size} ranks")
        print(
            f"- {options.batch} images of side {options.side} per rank; medians of {options.updates} updates each"
        )
        print(f"- command: `{this_command()}`\n")
        print("| engine | update ms | with the check ms | extra ms | of an update | every 100 updates |")
        print("|---|---|---|---|---|---|")
        print("\n".join(rows), flush=True)
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
