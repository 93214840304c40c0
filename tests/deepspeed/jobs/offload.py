"""Job for one rank: offloads optimizers that the program builds itself, and writes what came of it.

usage: offload.py DIRECTORY [--local_rank=N]
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

import arsg_dist.deepspeed
from arsg_dist import ARSG
from arsg_dist.deepspeed.checkpoint.engine_state import engine_state
from arsg_dist.engine import end_process
from tests.deepspeed.jobs.common import gathered, job, refusal, weights_of
from tests.deepspeed.matrix import LARGE
from tests.deepspeed.nvme import NVME
from tests.support import toy

CPU = {"device": "cpu"}


def attempts() -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Name, config and optimizer argument of each attempt."""
    section = {"optimizer": {"type": "ARSG", "params": toy.HYPERPARAMETERS}}
    settings: dict[str, Any] = toy.HYPERPARAMETERS

    def built(parameters: Any, **more: Any) -> ARSG:
        return ARSG(parameters, **{**settings, **more})

    for stage in (1, 3):
        yield f"{stage} json", _zero(stage, CPU) | section, None
        yield f"{stage} object", _zero(stage, CPU), "object"
        yield f"{stage} callable", _zero(stage, CPU), built
    yield "forced", _zero(1, CPU) | {"zero_force_ds_cpu_optimizer": True}, built
    yield "adam", _zero(1, CPU), torch.optim.Adam
    for name, more in (
        ("nvme with lookahead", {"lookahead_k": 2, "betas": (0.9, 0.99)}),
        ("nvme with bfloat16", {"state_dtype": torch.bfloat16}),
    ):
        nvme = _zero(3, {"device": "nvme", "nvme_path": "not-made", "buffer_count": 5})
        yield name, nvme, lambda parameters, more=more: built(parameters, **more)


def _zero(stage: int, offload: dict[str, Any]) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, "offload_optimizer": offload}}


def main() -> None:
    output = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    with job(output / "results.pt") as results:
        outcomes: dict[str, Any] = {
            name: attempt(config, optimizer) for name, config, optimizer in attempts()
        }
        if NVME:
            outcomes["on nvme"] = refusals_on_nvme(output)
        results["ranks"] = gathered(outcomes)


def attempt(config: dict[str, Any], optimizer: Any) -> str | dict[str, Tensor]:
    """The weights after some updates, or what was raised."""
    model = toy.build_model()
    if optimizer == "object":
        optimizer = ARSG(model.parameters(), **toy.HYPERPARAMETERS)
    config |= {"train_batch_size": toy.BATCH, "gradient_clipping": 0.0, "steps_per_print": 10**6}
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), optimizer=optimizer, config=config
        )
    except Exception as refusal:  # the test says which one is right
        return f"{type(refusal).__name__}: {refusal}"
    rank, size = deepspeed.comm.get_rank(), toy.BATCH // deepspeed.comm.get_world_size()
    for update in range(toy.UPDATES):
        inputs, targets = (whole[rank * size : (rank + 1) * size] for whole in toy.batch(update))
        engine.backward(toy.loss_of(engine(inputs), targets))
        engine.step()
    weights = weights_of(model)
    engine.destroy()
    return weights


def refusals_on_nvme(directory: Path) -> dict[str, str | None]:
    """What an engine says whose state really is on NVMe."""
    nvme = {"device": "nvme", "nvme_path": str(directory / "nvme"), "buffer_count": 5}
    config = _zero(3, nvme) | {"optimizer": {"type": "ARSG", "params": toy.HYPERPARAMETERS}}
    config |= {"train_batch_size": toy.BATCH, "gradient_clipping": 0.0, "steps_per_print": 10**6}
    model = toy.build_model(*LARGE)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    rank, ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    inputs, targets = (whole[rank::ranks] for whole in toy.batch(0))
    engine.backward(toy.loss_of(engine(inputs), targets))
    engine.step()
    said = {
        "save_checkpoint": refusal(lambda: engine.save_checkpoint(str(directory / "saved"))),
        "load_checkpoint": refusal(lambda: engine.load_checkpoint(str(directory), tag="some")),
        "export": refusal(lambda: arsg_dist.deepspeed.export(engine, directory / "model.safetensors")),
        "base_iterate": refusal(lambda: arsg_dist.deepspeed.base_iterate(engine).__enter__()),
        "state": refusal(lambda: engine_state(engine, rank, ranks)),
    }
    engine.backward(toy.loss_of(engine(inputs), targets))
    engine.step()
    engine.destroy()
    return said


if __name__ == "__main__":
    main()
    end_process(0)
