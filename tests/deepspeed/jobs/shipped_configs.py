"""Job for one rank: trains with every config that the repository ships, and counts bytes and messages.

usage: shipped_configs.py OUTPUT_DIRECTORY [--local_rank=N]
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from arsg_dist.engine import end_process
from tests.deepspeed import shipped_configs as problem
from tests.deepspeed.counted_bytes import count_cases
from tests.deepspeed.jobs.common import job
from tests.deepspeed.nvme import NVME


def main() -> None:
    output = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    with job(output / "results.pt") as results:
        results |= {
            path.name: train(path, output / path.stem)
            for path in problem.CONFIGS
            if NVME or not problem.needs_nvme(path)
        }
        results["bytes"] = count_cases(output)


def train(path: Path, scratch: Path) -> dict[str, Any]:
    """The mean loss over the ranks before each update, and the names of files with this rank's state."""
    rank, world_size = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    config = problem.config_of(path, world_size, scratch)
    model = problem.build_model(path)
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
    files = [file.name for file in scratch.glob(f"zero_stage_3/optimizer/rank{rank}/*.swp")]
    engine.destroy()
    return {"losses": losses, "swap files": files}


if __name__ == "__main__":
    main()
    end_process(0)
