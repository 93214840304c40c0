"""Job for one rank: trains with every config that the repository ships, and counts bytes and messages.

usage: deepspeed_configs_job.py OUTPUT_DIRECTORY NAMES_TO_LEAVE_OUT [--local_rank=N]
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

import arsg_dist.deepspeed
from arsg_dist.engine import end_process
from tests.support import deepspeed_configs as problem
from tests.support.deepspeed_bytes import count_cases


def main() -> None:
    output, left_out = (a for a in sys.argv[1:] if not a.startswith("--"))
    torch.set_num_threads(1)
    deepspeed.init_distributed(verbose=False)
    arsg_dist.deepspeed.release_shared_memory()
    type(get_accelerator()).is_fp16_supported = lambda _: True
    results: dict[str, Any] = {
        path.name: train(path, Path(output))
        for path in problem.CONFIGS
        if path.name not in left_out.split(",")
    }
    results["bytes"] = count_cases()
    if deepspeed.comm.get_rank() == 0:
        torch.save(results, Path(output) / "results.pt")
    deepspeed.comm.barrier()
    torch.distributed.destroy_process_group()


def train(path: Path, scratch: Path) -> list[float]:
    """The mean loss over the ranks before each update."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    config = problem.config_of(path, world_size, scratch)
    model = problem.build_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    dtype = next(model.parameters()).dtype
    steps = engine.gradient_accumulation_steps()
    size = problem.BATCH // (world_size * steps)
    losses = []
    for _ in range(problem.UPDATES):
        total = torch.zeros(1, dtype=torch.float64)
        for step in range(steps):
            start = (step * world_size + rank) * size
            loss = problem.loss_of(engine, slice(start, start + size), dtype)
            total += loss.item() / (steps * world_size)
            engine.backward(loss)
            engine.step()
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    assert engine.skipped_steps == 0
    engine.destroy()
    return losses


if __name__ == "__main__":
    main()
    end_process(0)
