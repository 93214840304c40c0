"""Every script of examples/ trains on two ranks and ends with the weights of a single process.

A new example is a row of `ROWS`.
"""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import arsg_dist.imagenet.torchvision_compat  # noqa: F401  (timm imports torchvision)
from arsg_dist import ARSG
from tests.support.compare import assert_same_weights
from tests.support.launchers import REPOSITORY, launch

EXAMPLES = REPOSITORY / "examples"
# What torchrun sets beside the ranks, by which Lightning knows that it was started by it.
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}


def module(name: str) -> Any:
    """A script of examples/, imported."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec.loader.exec_module(made)
    finally:
        sys.path.remove(str(EXAMPLES))
    return made


@dataclass(frozen=True)
class Row:
    """An example and how it is started.

    Attributes:
        script: its name.
        arguments: of it.
        needs: packages beside those of the test extra.
        optimizer: of `examples/task.py`.
        decay_biases: whether the framework leaves weight decay as it was given.
        turn: of CI's three in which it runs; None for each.
        variables: of its environment.
        pretend: its framework shards on accelerators only: see `jobs/as_on_accelerators.py`.
    """

    script: str
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    optimizer: str = "arsg"
    decay_biases: bool = True
    turn: int | None = None
    variables: dict[str, str] = field(default_factory=dict)
    pretend: bool = False


REMOTE = ("--optimizer", "remote")
ROWS = {
    "torch DDP": Row("torch_ddp"),
    "torch DDP, remote": Row("torch_ddp", REMOTE, optimizer="remote"),
    "torch FSDP2": Row("torch_fsdp2"),
    "torch FSDP2, remote": Row("torch_fsdp2", REMOTE, optimizer="remote"),
    "torch checkpoint": Row("torch_checkpoint"),
    "torch checkpoint, remote": Row("torch_checkpoint", REMOTE, optimizer="remote"),
    "accelerate": Row("accelerate_loop"),
    "accelerate, remote": Row("accelerate_loop", REMOTE, optimizer="remote", turn=0),
    "accelerate FSDP2": Row("accelerate_loop", variables=FSDP, pretend=True, turn=1),
    "Trainer": Row("hf_trainer", decay_biases=False, turn=0),
    "Trainer, DeepSpeed": Row("hf_trainer", ("--parallel", "deepspeed"), turn=1),
    "Trainer, FSDP2": Row("hf_trainer", ("--parallel", "fsdp"), decay_biases=False, pretend=True, turn=2),
    "Lightning": Row("lightning_trainer", needs=("lightning",), turn=0),
    "Lightning FSDP2": Row("lightning_trainer", ("--strategy", "fsdp2"), needs=("lightning",), turn=1),
    "Lightning DeepSpeed": Row(
        "lightning_trainer", ("--strategy", "deepspeed"), needs=("lightning",), pretend=True, turn=2
    ),
}


@cache
def alone(optimizer: str, decay_biases: bool = True) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = module("task").train_alone(optimizer, decay_biases=decay_biases)
    return weights


def start() -> dict[str, Tensor]:
    network: torch.nn.Module = module("task").Network()
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def required(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if row.turn is None else [pytest.mark.turn(row.turn)])
        for name, row in ROWS.items()
    ],
)
def test_an_example_trains_as_one_process(name: str, tmp_path: Path) -> None:
    """Catches settings that a framework does not hand on, an optimizer that it replaces or makes over other tensors
    than it trains, gradients summed and not averaged, and state that a checkpoint loses."""
    row = ROWS[name]
    required(*row.needs)
    script = f"examples/{row.script}.py"
    program = ("tests/examples/jobs/as_on_accelerators.py", script) if row.pretend else (script,)
    output = tmp_path / "weights.safetensors"
    job = launch(
        "warm torchrun",
        2,
        program[0],
        *program[1:],
        *("--output", output, *row.arguments),
        variables={**TORCHRUN, **row.variables},
        timeout=240,
    )
    assert job.code == 0, job.output[-6000:]
    assert_same_weights(load_file(output), alone(row.optimizer, row.decay_biases), started_from=start())


@pytest.mark.turn(1)
def test_the_first_example_runs_as_its_docstring_says(tmp_path: Path) -> None:
    """Catches an example that runs inside the tests only."""
    output = tmp_path / "weights.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone"]
    ended = subprocess.run(
        [*command, "examples/torch_ddp.py", "--output", output],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert_same_weights(load_file(output), alone("arsg"), started_from=start())


def test_timm_makes_arsg_by_its_name_with_its_settings() -> None:
    """Catches a name that timm does not know, settings of --opt-betas, --opt-eps and --opt-kwargs that do not arrive,
    and a decay that is coupled where it should not be."""
    required("timm")
    import timm.optim

    import arsg_dist.timm  # noqa: F401

    task = module("task")
    given = {"opt": "arsg", "lr": 0.02, "weight_decay": 0.01, "eps": 1e-3, "betas": (0.9, 0.99), "mu": 0.2}
    for name, decoupled in (("arsg", False), ("arsgw", True)):
        made = timm.optim.create_optimizer_v2(task.Network(), **{**given, "opt": name})
        assert type(made) is ARSG
        decayed = sorted(group["weight_decay"] for group in made.param_groups)
        assert decayed == [0, 0.01]
        for group in made.param_groups:
            assert group["decoupled_weight_decay"] is decoupled
            assert (group["lr"], group["mu"], group["betas"], group["eps"]) == (0.02, 0.2, (0.9, 0.99), 1e-3)
    network = task.Network()
    optimizer = timm.optim.create_optimizer_v2(network.parameters(), **given)
    for _ in range(task.UPDATES):
        optimizer.zero_grad()
        network(*task.samples())["loss"].backward()
        optimizer.step()
    assert_same_weights(dict(network.state_dict()), alone("arsg"), started_from=start(), relative=0)
    assert timm.optim.get_optimizer_info("arsg").has_betas


def test_torchtitans_container_trains_and_goes_on() -> None:
    """Catches a container that does not know ARSG, settings of torchtitan's that ARSG refuses, and its way of saving,
    with a step of learning rate 0 before, that changes weights or loses state."""
    required("torchtitan")
    task, titan = module("task"), module("torchtitan_optimizer")

    def build() -> tuple[torch.nn.Module, Any]:
        network = task.Network()
        return network, titan.ARSGContainer(titan.arsg(**task.SETTINGS), model_parts=[network])

    def train(network: torch.nn.Module, optimizers: Any, updates: int) -> None:
        for _ in range(updates):
            optimizers.zero_grad()
            network(*task.samples())["loss"].backward()
            optimizers.step()

    network, optimizers = build()
    train(network, optimizers, task.UPDATES // 2)
    optimizers.zero_grad()
    saved = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in optimizers.state_dict().items()
    }
    again, others = build()
    again.load_state_dict(network.state_dict())
    others.load_state_dict(saved)
    train(again, others, task.UPDATES - task.UPDATES // 2)
    assert_same_weights(dict(again.state_dict()), alone("arsg"), started_from=start(), relative=0)


@pytest.mark.ranks
@pytest.mark.turn(2)
def test_rays_example_trains_as_one_process(tmp_path: Path) -> None:
    """Catches what a warm rank does not show: workers that Ray starts."""
    required("ray")
    output = tmp_path / "weights.safetensors"
    ended = subprocess.run(
        [sys.executable, "examples/ray_train.py", "--output", output],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert_same_weights(load_file(output), alone("arsg"), started_from=start())
