"""Runs of other engines converted for DeepSpeed's `load_universal`, loaded by DeepSpeed itself, on one rank."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from arsg_dist import ARSG
from arsg_dist.checkpoint import CheckpointStore, SavedRun, save_run
from arsg_dist.deepspeed import DeepSpeedEngine
from arsg_dist.engine import SingleProcessCommunicator, SingleProcessEngine
from tests.checkpoint.test_commands import command
from tests.deepspeed.one_rank import one_rank


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    """A job of one rank, for the tests of this file."""
    with one_rank():
        yield


class Network(nn.Module):
    """A buffer, and a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.last = nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Linear(7, 3)
        self.kept = nn.Parameter(torch.arange(5.0), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.layer(inputs + self.kept))).square().mean()


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """One group: DeepSpeed's stage 3 gives all groups the first one's settings, for other optimizers than ARSG."""
    return [{"params": [parameter for parameter in module.parameters() if parameter.requires_grad]}]


def update(engine: Any, seed: int) -> None:
    torch.manual_seed(seed)
    engine.backward(engine.module(torch.randn(6, 5)))
    engine.step()


def saved(directory: Path, kind: str) -> tuple[SingleProcessEngine, Path]:
    """What two updates in one process leave."""
    module = Network()
    made: dict[str, Any] = {
        "arsg": lambda parts: ARSG(parts, lr=0.01, eps=1e-3),
        "adamw": lambda parts: torch.optim.AdamW(parts, lr=0.01, weight_decay=0.1),
        "sgd": lambda parts: torch.optim.SGD(parts, lr=0.01, momentum=0.9),
    }
    engine = SingleProcessEngine(module, made[kind](groups(module)))
    for seed in range(2):
        update(engine, seed)
    store = CheckpointStore(directory / "run", engine.communicator)
    path = save_run(store, 2, engine.state(), {"update": 2}, engine.communicator)
    assert command("convert", path, directory / "universal", "--to", "deepspeed") == 0
    return engine, path


CONFIG = {
    "train_batch_size": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "checkpoint": {"load_universal": True},
}


def started(kind: str, stage: int) -> Any:
    """DeepSpeed's engine, with its own way to load and another optimizer than the converted run's settings."""
    module = Network()
    for parameter in groups(module)[0]["params"]:
        nn.init.ones_(parameter)
    config = {**CONFIG, "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000}}
    if kind == "arsg":
        config["optimizer"] = {"type": "ARSG", "params": {"lr": 1.0}}
        return DeepSpeedEngine(
            module, config, SingleProcessCommunicator(), parameter_groups=groups(module)
        ).engine
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(groups(module), lr=1.0, momentum=0.5)
        if kind == "sgd"
        else torch.optim.AdamW(groups(module), lr=1.0)
    )
    if kind == "cpu adam":
        optimizer = DeepSpeedCPUAdam(groups(module), lr=1.0, adamw_mode=True)
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def whole(engine: Any) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        *[("arsg", stage) for stage in (1, 3)],
        *[("adamw", stage) for stage in (1, 2, 3)],
        ("cpu adam", 2),
        ("sgd", 2),
    ],
)
def test_a_run_of_one_process_goes_on_under_deepspeeds_own_loading(
    kind: str, stage: int, tmp_path: Path
) -> None:
    """Catches moments or steps that DeepSpeed does not find, settings of the new optimizer left in place, and buffers
    or frozen parameters left at their start; and a way back that knows ARSG's checkpoints only."""
    engine, _ = saved(tmp_path, "adamw" if kind == "cpu adam" else kind)
    target = started(kind, stage)
    path, _ = target.load_checkpoint(tmp_path, tag="universal")
    assert path is not None
    assert target.global_steps == 2
    for seed in (5, 6):
        update(engine, seed)
        torch.manual_seed(seed)
        target.backward(target(torch.randn(6, 5)))
        target.step()
    loaded = whole(target)
    names = {name for name, _ in engine.module.named_parameters()}
    for name, tensor in engine.module.state_dict().items():
        if name in names - {"kept"} or kind == "arsg":
            torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-6)

    target.save_checkpoint(tmp_path, tag="own")
    assert command("convert", tmp_path / "own", tmp_path / "back") == 0
    back = SavedRun(tmp_path / "back")
    parameters = dict(engine.module.named_parameters())
    assert set(back.trained) == names - {"kept"}
    for name in back.trained:
        held = engine.optimizer.state[parameters[name]]
        assert set(held) == back.entries(name)
        for entry, value in held.items():
            if entry == "step":
                assert back.number(name, entry) == 4
            else:
                torch.testing.assert_close(back.whole(entry, name), value, rtol=1e-4, atol=1e-7)


def test_the_converted_run_is_read_back_by_our_own_reader(tmp_path: Path) -> None:
    """Catches a group, a name or a frozen parameter that the universal layout has lost."""
    _, path = saved(tmp_path, "adamw")
    assert command("convert", tmp_path / "universal", tmp_path / "again") == 0
    before, after = SavedRun(path), SavedRun(tmp_path / "again")
    assert set(before.parameters) == set(after.parameters)
    assert set(before.buffers) == set(after.buffers)
    assert before.group_of == after.group_of
    assert before.groups == after.groups
    for name in before.trained:
        assert before.entries(name) == after.entries(name)
        assert torch.equal(before.whole("exp_avg_sq", name), after.whole("exp_avg_sq", name))
        assert before.number(name, "step") == after.number(name, "step") == 2
