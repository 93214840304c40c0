"""The table of engines is the one place that names them."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from arsg_dist.engine import (
    ENGINES,
    Engine,
    EngineBuilder,
    SingleProcessCommunicator,
    TrainingSettings,
    discover_ranks,
    load_builder,
)
from tests.support.launchers import REPOSITORY


def settings(**changes: object) -> TrainingSettings:
    values: dict[str, object] = {
        "batch_size": 4,
        "optimizer_type": "SGD",
        "optimizer_params": {"lr": 0.1},
        "parameter_groups": lambda module: [{"params": list(module.parameters())}],
        "build_optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1),
    }
    return TrainingSettings(**values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ENGINES)
def test_every_row_leads_to_a_builder(name: str) -> None:
    """Catches a row whose module or class was moved, and an engine whose extra nobody can install."""
    assert issubclass(load_builder(name), EngineBuilder)
    assert ENGINES[name].name == name
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    package = ENGINES[name].builder.split(".")[1]
    needs_torch_only = package in ("engine", "ddp", "fsdp")
    assert needs_torch_only or package in project["optional-dependencies"]


def test_the_builder_of_a_single_process_does_what_the_settings_say() -> None:
    """Catches settings that are dropped on their way from the recipe to the engine."""
    wanted = settings(
        accumulation_steps=3, clip_grad_norm=0.5, precision="fp16", skip_nonfinite=True, channels_last=True
    )
    builder = load_builder("single")(wanted, world_size=1)
    assert builder.precision == "fp16"
    assert load_builder("single")(settings(), world_size=1).precision == "fp32"
    ranks = discover_ranks({})
    engine = builder.build(nn.Conv2d(3, 4, 3), builder.connect(ranks), ranks)
    assert (engine.kind, engine.accumulation_steps, engine.loss_scaling) == ("single", 3, True)
    assert next(engine.module.parameters()).is_contiguous(memory_format=torch.channels_last)
    assert isinstance(engine.optimizer, torch.optim.SGD)
    assert isinstance(engine.communicator, SingleProcessCommunicator)


def test_whole_weights_are_copies_in_float32_with_the_buffers() -> None:
    """Catches weights that change after they were taken, in half precision, or without batch norm's statistics."""
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(torch.float16)
    builder = load_builder("single")(settings(), world_size=1)
    engine: Engine = builder.build(module, SingleProcessCommunicator(), discover_ranks({}))
    taken = engine.whole_weights()
    assert taken.keys() == module.state_dict().keys()
    before = module[0].weight.detach().float().clone()
    with torch.no_grad():
        module[0].weight += 1
    assert torch.equal(taken["0.weight"], before)
    assert {tensor.dtype for tensor in taken.values()} == {torch.float32, torch.int64}


def test_nothing_above_the_engines_names_one() -> None:
    """Catches a list of engines beside the table, which the next engine would not be in."""
    found = []
    for path in sorted(Path(REPOSITORY / "arsg_dist/imagenet").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in ENGINES:
                found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.value!r}")
            if isinstance(node, ast.Attribute | ast.Name) and re.match("ds_", getattr(node, "attr", "")):
                found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.attr}")  # type: ignore[union-attr]
    for path in sorted(
        Path(REPOSITORY / "arsg_dist/cli").rglob("*.py")
    ):  # "horovod" is a rendezvous there too
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and "engine" in ast.unparse(node.left):
                names = [part.value for part in node.comparators if isinstance(part, ast.Constant)]
                found += [
                    f"{path.relative_to(REPOSITORY)}:{node.lineno} {n!r}" for n in names if n in ENGINES
                ]
    assert not found, "\n".join(found)
