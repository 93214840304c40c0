"""Job for one process: saves a checkpoint of every stage and precision, and loads some that somebody else has prepared.

usage: files.py DIRECTORY
"""

import argparse
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from tests.deepspeed.jobs.common import loading, set_up
from tests.support.hostile import Own, OwnDictionary, Payload

PRECISIONS = ("fp32", "bf16", "fp16")
STATE = {
    "epoch": 7,
    "args": argparse.Namespace(lr=0.1, dtype=torch.float16),
    "best": np.float64(0.5),
    "numpy": np.random.default_rng(0).integers(0, 9, (2, 3)),
}


def main() -> None:
    root = Path(sys.argv[1])
    os.environ["LOCAL_RANK"] = "0"
    set_up(init_method=f"file://{root / 'rendezvous'}", rank=0, world_size=1, auto_mpi_discovery=False)
    for stage, precision in itertools.product(range(4), PRECISIONS):
        engine = build(stage, precision)
        train(engine)
        engine.save_checkpoint(str(root / f"zero{stage}-{precision}"), client_state=STATE)
        engine.destroy()
    (root / "loaded.json").write_text(json.dumps(loaded(root)))


def build(stage: int, precision: str, **sections: Any) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    model.register_buffer("seen", torch.ones(3))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "ARSG", "params": {"lr": 0.01}},
        **sections,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
        config |= {"fp16": {"enabled": True, "initial_scale_power": 4}} if precision == "fp16" else {}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    return engine


def train(engine: Any) -> None:
    inputs = torch.ones(4, 4, dtype=next(engine.module.parameters()).dtype)
    engine.backward(engine(inputs).float().square().mean())
    engine.step()


def loaded(root: Path) -> dict[str, Any]:
    """What loading says, for checkpoints with objects of the user's own, and with those of somebody else."""
    said: dict[str, Any] = {}
    engine = build(1, "fp32")
    for name, thing in {"own": Own(3), "own dictionary": OwnDictionary(x=3)}.items():
        engine.save_checkpoint(str(root / name), client_state={"thing": thing})
        _, state = engine.load_checkpoint(str(root / name))
        said[name] = state["thing"].x if name == "own" else state["thing"]["x"]
    for name, more in {"seven ranks": {"dp_world_size": 7}, "another": {}}.items():
        shutil.copytree(root / "zero1-fp32", root / name)
        for path in (root / name).glob("*/*.pt"):
            content = torch.load(path, weights_only=False)
            torch.save({**content, **more, "payload": Payload(root / f"{name} executed")}, path)
    said["seven ranks"] = loading(engine, root / "seven ranks")
    (root / "another" / "latest").write_text("../another/global_step1")
    said["latest"] = loading(engine, root / "another")
    (root / "another" / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    said["missing"] = loading(engine, root / "another", tag="global_step1")
    engine.destroy()
    engine = build(3, "fp32")
    said["another stage"] = loading(engine, root / "another", tag="global_step1")
    engine.destroy()
    for stage in (0, 1):
        said[f"experts {stage}"] = experts_resume(root / f"experts{stage}", stage)
    return said


class Mixture(torch.nn.Module):
    """A small network with two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
        self.experts = MoE(6, torch.nn.Linear(6, 6), num_experts=2, ep_size=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.second(self.experts(self.first(inputs))[0])
        return outputs


def experts_resume(folder: Path, stage: int) -> bool:
    """Whether weights come back, and the next update is the one that followed the save."""
    torch.manual_seed(0)
    model = Mixture()
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "ARSG", "params": {"lr": 0.01}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    seen = []
    for attempt in ("first", "loaded"):
        if attempt == "loaded":
            engine.load_checkpoint(str(folder))
        else:
            train(engine)
            engine.save_checkpoint(str(folder))
        for _ in range(2):
            seen.append([parameter.detach().clone() for parameter in engine.module.parameters()])
            torch.manual_seed(1)
            train(engine)
    engine.destroy()
    return all(torch.equal(a, b) for i in (0, 1) for a, b in zip(seen[i], seen[i + 2], strict=True))


if __name__ == "__main__":
    main()
