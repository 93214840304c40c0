"""Job for one rank: trains the toy problem through the `Engine` interface and writes the weights rank 0 ends with.

usage: engine_job.py ENGINE OUTPUT ACCUMULATION_STEPS CLIP_GRAD_NORM [--local_rank=N]
"""

import sys
from pathlib import Path

import torch

from arsg_dist import ARSG
from arsg_dist.engine import Engine, discover_ranks, end_process
from tests.support import toy
from tests.support.launchers import REPOSITORY
from tests.support.messages import check_messages

HYPERPARAMETERS = toy.HYPERPARAMETERS | {"fused": True}  # tests/deepspeed/jobs/plain.py has the default path


def main() -> None:
    engine_name, output, accumulation, clip = (a for a in sys.argv[1:] if not a.startswith("--"))
    accumulation_steps, clip_grad_norm = int(accumulation), float(clip)
    ranks = discover_ranks()
    model = toy.build_model()
    engine: Engine
    if engine_name == "deepspeed":
        from arsg_dist import deepspeed

        communicator = deepspeed.connect(ranks)
        config = deepspeed.resolve_config(
            str(REPOSITORY / "configs/deepspeed/zero1.json"),
            world_size=communicator.world_size,
            batch_size=toy.BATCH,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
            optimizer={"type": "ARSG", "params": HYPERPARAMETERS},
        )
        engine = deepspeed.DeepSpeedEngine(model, config, communicator)
    elif engine_name == "ddp":
        from arsg_dist import ddp

        communicator = ddp.connect(ranks)
        engine = ddp.DDPEngine(
            model,
            ARSG(model.parameters(), **HYPERPARAMETERS),
            communicator,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
        )
    elif engine_name == "fsdp":
        from arsg_dist import fsdp

        communicator = fsdp.connect(ranks)
        fsdp.shard(model)
        engine = fsdp.FSDPEngine(
            model,
            ARSG(model.parameters(), **HYPERPARAMETERS),
            communicator,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
        )
    else:
        from arsg_dist import horovod

        communicator = horovod.connect(ranks)
        engine = horovod.HorovodEngine(
            model,
            ARSG(model.parameters(), **HYPERPARAMETERS),
            communicator,
            accumulation_steps=accumulation_steps,
            clip_grad_norm=clip_grad_norm,
        )
    micro_batch = toy.BATCH // (communicator.world_size * accumulation_steps)
    for update in range(toy.UPDATES):
        inputs, targets = toy.batch(update)
        for step in range(accumulation_steps):
            start = (step * communicator.world_size + communicator.rank) * micro_batch
            part = slice(start, start + micro_batch)
            engine.backward(toy.loss_of(engine.module(inputs[part]), targets[part]))
            engine.step()
    if engine_name == "fsdp":
        whole = communicator.from_rank_0(engine.whole_weights())
        weights = {name: whole[name] for name, _ in model.named_parameters()}
    else:
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for other in communicator.all_gather_object(weights):
        assert all(torch.equal(weights[name], other[name]) for name in weights), (
            "ranks hold different weights"
        )
    check_messages(communicator)
    if communicator.rank == 0:
        torch.save(weights, Path(output))
    communicator.close()
    end_process(0)


if __name__ == "__main__":
    main()
