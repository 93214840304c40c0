"""Train with a loop of your own on any engine: schedule, clipping, checkpoints, resume, evaluation.

    python examples/own_script.py
    torchrun --nproc-per-node 2 examples/own_script.py --engine ddp        # or fsdp
    deepspeed --num_accelerators 2 examples/own_script.py --engine deepspeed
    mpirun -np 2 --bind-to none python examples/own_script.py --engine horovod        # or horovod-sharded

Stopped and started again it goes on after its last checkpoint, on any engine and number of ranks.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.engine import Engine, SingleProcessEngine, discover_ranks, end_process

SETTINGS = {"lr": 0.02, "betas": (0.99, 0.99), "mu": 0.1, "eps": 1e-4}
CLIP, BATCH = 1.0, 60


def build_engine(name: str, model: nn.Module) -> Engine:
    """All that differs between the engines."""
    ranks = discover_ranks()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "single":
        model.to(device)
        return SingleProcessEngine(model, ARSG(model.parameters(), **SETTINGS), clip_grad_norm=CLIP)
    if name == "ddp":
        from arsg_dist import ddp

        communicator = ddp.connect(ranks)
        model.to(device)
        return ddp.DDPEngine(model, ARSG(model.parameters(), **SETTINGS), communicator, clip_grad_norm=CLIP)
    if name == "fsdp":
        from arsg_dist import fsdp

        communicator = fsdp.connect(ranks)
        fsdp.shard(model.to(device))  # before the optimizer is made
        return fsdp.FSDPEngine(model, ARSG(model.parameters(), **SETTINGS), communicator, clip_grad_norm=CLIP)
    if name == "deepspeed":
        from arsg_dist import deepspeed

        communicator = deepspeed.connect(ranks)
        config = {
            "train_batch_size": BATCH,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "ARSG", "params": SETTINGS},
        }
        return deepspeed.DeepSpeedEngine(model, config, communicator)
    from arsg_dist import horovod

    communicator = horovod.connect(ranks)
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
    model.to(device)
    kind = {"horovod": horovod.HorovodEngine, "horovod-sharded": horovod.HorovodShardedEngine}[name]
    return kind(model, ARSG(model.parameters(), **SETTINGS), communicator, clip_grad_norm=CLIP)


def main() -> None:
    """Train, or go on with the training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", default="single")
    parser.add_argument("--output", type=Path, default=Path("runs/own"))
    parser.add_argument("--updates", type=int, default=200, help="of the whole training: at most 200")
    parser.add_argument("--checkpoint_every", type=int, default=40)
    parser.add_argument("--local_rank", help="deepspeed's launcher gives it to every script")
    arguments = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).flatten(1)
    labels = torch.tensor(digits.target)
    held_out = slice(1500, None)

    torch.manual_seed(0)  # the same start on every rank
    engine = build_engine(arguments.engine, nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    rank, world_size = engine.communicator.rank, engine.communicator.world_size
    schedule = torch.optim.lr_scheduler.LambdaLR(
        engine.optimizer, lambda update: min(1.0, (update + 1) / 20) * (1.0 - update / 200)
    )

    store = CheckpointStore(arguments.output / "checkpoints", engine.communicator)
    first = 0
    if (latest := store.latest()) is not None:
        saved = SavedRun(latest)
        engine.load_state(saved)
        first = saved.progress["update"]
        schedule.load_state_dict(saved.progress["schedule"])

    for update in range(first, arguments.updates):
        order = torch.randperm(1500, generator=torch.Generator().manual_seed(update))  # alike on every rank
        own = order[rank * BATCH // world_size : (rank + 1) * BATCH // world_size]
        logits = engine.module(images[own].to(engine.device, engine.input_dtype))
        engine.backward(cross_entropy(logits.float(), labels[own].to(engine.device)))
        engine.step()
        schedule.step()
        if (update + 1) % arguments.checkpoint_every == 0 or update + 1 == arguments.updates:
            progress = {"update": update + 1, "schedule": schedule.state_dict()}
            save_run(store, update + 1, engine.state(), progress, engine.communicator)

    engine.module.eval()
    own = range(len(images))[held_out][rank::world_size]
    with torch.no_grad():
        logits = engine.module(images[own].to(engine.device, engine.input_dtype))
        right = (logits.argmax(1).cpu() == labels[own]).sum().double()
    right = engine.communicator.all_reduce_sum(right)
    if rank == 0:
        print(
            f"{int(right)} of {len(images[held_out])} held-out digits are right after {arguments.updates} updates"
        )
    engine.communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
