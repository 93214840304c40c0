"""A user's DeepSpeed script that knows ARSG by one import only: trains the toy problem under ZeRO 0, 1, 2 and 3.

usage: plain.py OUTPUT_DIRECTORY [--local_rank=N]
"""

import sys
from pathlib import Path

import deepspeed
import torch

import arsg_dist.deepspeed  # makes "type": "ARSG" known
from arsg_dist.engine import end_process
from tests.support import toy


def main() -> None:
    output = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    deepspeed.init_distributed(verbose=False)
    arsg_dist.deepspeed.release_shared_memory()
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    micro_batch = toy.BATCH // world_size
    part = slice(rank * micro_batch, (rank + 1) * micro_batch)
    for stage in range(4):
        model = toy.build_model()
        config = {
            "train_batch_size": toy.BATCH,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "ARSG", "params": toy.HYPERPARAMETERS},
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**6,
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        for update in range(toy.UPDATES):
            inputs, targets = toy.batch(update)
            engine.backward(toy.loss_of(engine(inputs[part]), targets[part]))
            engine.step()
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if rank == 0:
            torch.save(weights, output / f"zero{stage}.pt")
        engine.destroy()
    deepspeed.comm.barrier()
    torch.distributed.destroy_process_group()
    end_process(0)


if __name__ == "__main__":
    main()
