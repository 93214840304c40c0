"""Job for one rank: visits the base iterate under every ZeRO stage and precision and writes what was seen there.

usage: base_iterate.py DIRECTORY SELECTION [--local_rank=N]
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import arsg_dist.deepspeed  # makes "type": "ARSG" known
from arsg_dist.engine import end_process
from tests.deepspeed import matrix
from tests.deepspeed.jobs.common import job, refusal, weights_of
from tests.deepspeed.jobs.matrix import begin, masters, update
from tests.deepspeed.visited_cases import Visited, visited_cases
from tests.support import toy

VISIT_AFTER = (0, 3, toy.UPDATES)  # updates made when θ is visited


def main() -> None:
    directory, selection = (a for a in sys.argv[1:] if not a.startswith("--"))
    with job(Path(directory) / "results.pt") as results:
        results |= {str(case): compare(case) for case in visited_cases(selection)}


def compare(visited: Visited) -> dict[str, Any]:
    """Trains with and without visits; returns θ seen at the end and both runs' masters."""
    straight = train(visited, visit_after=())["masters"]
    result = train(visited, visit_after=VISIT_AFTER)
    return {**result, "straight": straight}


def train(visited: Visited, visit_after: tuple[int, ...]) -> dict[str, Any]:
    case = visited.case
    engine = begin(case, visited.config())
    seen: dict[str, Any] = {}
    if 0 in visit_after:
        before = weights_of(engine.module)
        with arsg_dist.deepspeed.base_iterate(engine):
            seen["moved before the first step"] = differing(before, weights_of(engine.module))
    for number in range(toy.UPDATES):
        update(engine, case, number)
        if number + 1 in visit_after:
            visit(engine, case, seen)
    seen["masters"] = masters(engine, case)
    engine.destroy()
    return seen


def visit(engine: Any, case: matrix.Case, seen: dict[str, Any]) -> None:
    x = weights_of(engine.module)
    inputs, _ = toy.batch(0)
    inputs = inputs.to(case.dtype)
    refused = seen["refused"] = {}
    with arsg_dist.deepspeed.base_iterate(engine):
        theta = seen["theta"] = weights_of(engine.module)
        engine.eval()
        with torch.no_grad():
            outputs = engine(inputs, 1)
        engine.train()
        for name, call in {
            "step": engine.step,
            "backward": lambda: engine.backward(outputs.sum()),
            "save_checkpoint": lambda: engine.save_checkpoint("/nonexistent"),
            "save_16bit_model": lambda: engine.save_16bit_model("/nonexistent"),
            "backward of a loss": lambda: engine(inputs, 1).sum().backward(),
            "load_checkpoint": lambda: engine.load_checkpoint("/nonexistent"),
            "optimizer.step": engine.basic_optimizer.step,
            "nested": lambda: arsg_dist.deepspeed.base_iterate(engine).__enter__(),
        }.items():
            refused[name] = refusal(call)
    seen["not restored"] = differing(x, weights_of(engine.module))
    twin = matrix.build_model(case).to(case.dtype)
    twin.load_state_dict(theta)
    with torch.no_grad():
        seen["outputs"], seen["outputs of a plain model"] = outputs.float(), twin(inputs, 1).float()
    try:
        with arsg_dist.deepspeed.base_iterate(engine):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    seen["not restored after an exception"] = differing(x, weights_of(engine.module))


def differing(some: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of parameters whose bits differ."""
    return [
        name for name in some if not torch.equal(some[name].view(torch.uint8), other[name].view(torch.uint8))
    ]


if __name__ == "__main__":
    main()
    end_process(0)
