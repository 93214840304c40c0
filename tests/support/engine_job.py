"""Job for one rank: trains the toy problem through the `Engine` interface and writes the weights rank 0 ends with.

usage: engine_job.py ENGINE OUTPUT ACCUMULATION_STEPS CLIP_GRAD_NORM [--local_rank=N]
"""

import sys
from pathlib import Path

import torch

from arsg_dist import ARSG
from arsg_dist.engine import ENGINES, TrainingSettings, discover_ranks, end_process, load_builder
from tests.support import toy
from tests.support.launchers import REPOSITORY
from tests.support.messages import check_messages

HYPERPARAMETERS = toy.HYPERPARAMETERS | {"fused": True}  # tests/deepspeed/jobs/plain.py has the default path


def main() -> None:
    engine_name, output, accumulation, clip = (a for a in sys.argv[1:] if not a.startswith("--"))
    ranks, entry = discover_ranks(), ENGINES[engine_name]
    wanted = TrainingSettings(
        batch_size=toy.BATCH,
        accumulation_steps=int(accumulation),
        clip_grad_norm=float(clip),
        optimizer_type="ARSG",
        optimizer_params=HYPERPARAMETERS,
        parameter_groups=lambda module: [{"params": [*module.parameters()]}],
        build_optimizer=lambda groups: ARSG(groups, **HYPERPARAMETERS),
        config_file=str(REPOSITORY / entry.config_file) if entry.config_file else None,
    )
    builder = load_builder(engine_name)(wanted, ranks.world_size)
    communicator, model = builder.connect(ranks), toy.build_model()
    engine = builder.build(model, communicator, ranks)
    micro_batch = toy.BATCH // (communicator.world_size * engine.accumulation_steps)
    for update in range(toy.UPDATES):
        inputs, targets = toy.batch(update)
        for step in range(engine.accumulation_steps):
            start = (step * communicator.world_size + communicator.rank) * micro_batch
            part = slice(start, start + micro_batch)
            engine.backward(toy.loss_of(engine.module(inputs[part]), targets[part]))
            engine.step()
    if builder.capabilities.no_replicas:  # no rank holds the whole
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
