"""The submissions to AlgoPerf against its interface; `python -m benchmarks.algoperf.check` runs the real thing."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from arsg_dist import ARSG, RemoteObservation
from tests.benchmarks.algoperf_interface import ARGUMENTS, Workload, batch_of, point, prepare, run, submission
from tests.support.launchers import REPOSITORY, launch

NAMES = ("arsg", "remote_adamw")
GIVEN = {
    "learning_rate": 0.02,
    "one_minus_beta1": 0.08,
    "one_minus_beta2": 0.05,
    "mu": 0.4,
    "weight_decay": 0.1,
    "warmup_factor": 0.2,
    "schedule_length": 0.5,
    "label_smoothing": 0.1,
    "dropout_rate": 0.25,
    "grad_clip": 0.3,
    "evaluate_at": "x",
}


def plain_optimizer(name: str, params: Any) -> ARSG | RemoteObservation:
    betas = (0.92, 0.95)
    if name == "arsg":
        settings: dict[str, Any] = {"decoupled_weight_decay": True, "preconditioner": "adam"}
        return ARSG(params, lr=0.02, betas=betas, mu=0.4, weight_decay=0.1, **settings)
    inner = torch.optim.AdamW(params, lr=0.02 * 0.4, betas=(0.0, 0.95), weight_decay=0.1)
    return RemoteObservation(inner, mu=0.4, beta1=0.92)


def plain_update(model: nn.Module, optimizer: Any, lr: float, step: int) -> None:
    """One update, written down without the submission."""
    batch, updates = batch_of(step), 10  # of the schedule: half of the step hint; two of them rise
    factor = (
        (step + 1) / 2 if step < 2 else 0.01 + 0.99 * (1 + math.cos(math.pi * min(1, (step - 2) / 8))) / 2
    )
    assert updates == 10
    for group in optimizer.param_groups:
        group["lr"] = lr * factor
    kept = batch["weights"] == 1
    model.train()
    losses = functional.cross_entropy(
        model(batch["inputs"]), batch["targets"], reduction="none", label_smoothing=0.1
    )
    optimizer.zero_grad()
    losses[kept].mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_the_functions_are_those_that_the_benchmark_calls(name: str) -> None:
    """Catches an argument that the benchmark names otherwise, and a workload without a batch size."""
    module = submission(name)
    for function, arguments in ARGUMENTS.items():
        assert tuple(inspect.signature(getattr(module, function)).parameters) == arguments
    assert module.get_batch_size("imagenet_resnet") == 1024
    with pytest.raises(
        ValueError, match="no batch size"
    ):  # the runner then asks for the workload it is a variant of
        module.get_batch_size("imagenet_resnet_silu")


@pytest.mark.parametrize("name", NAMES)
def test_every_corner_of_the_search_space_can_be_trained_with(name: str) -> None:
    """Catches a range in another form than the official one, a point that the optimizer refuses, a setting unread."""
    space = json.loads(
        (REPOSITORY / "benchmarks" / "algoperf" / name / "tuning_search_space.json").read_text()
    )
    assert set(space) == set(GIVEN)
    ends: dict[str, list[Any]] = {}
    for key, found in space.items():
        if "feasible_points" in found:
            ends[key] = [found["feasible_points"][0], found["feasible_points"][-1]]
        else:
            assert found["scaling"] in ("linear", "log")
            ends[key] = [found["min"], found["max"]]
            assert 0 < found["min"] < found["max"]
    module, workload = submission(name), Workload()
    model = workload.init_model_fn(0)
    read = ("learning_rate", "one_minus_beta1", "one_minus_beta2", "mu", "weight_decay")  # by the optimizer
    for places in itertools.product((0, 1), repeat=len(read)):
        others = {key: ends[key][places[0]] for key in ends}
        given = point(**others | {key: ends[key][place] for key, place in zip(read, places, strict=True)})
        state = module.init_optimizer_state(workload, model, None, given, None)
        assert all(hasattr(part, "state_dict") for part in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_an_update_is_that_of_a_plain_loop(name: str) -> None:
    """Catches a mean over examples that do not count, a setting that is not applied, and an update made at θ."""
    module, workload = submission(name), Workload()
    model = workload.init_model_fn(0)
    plain = copy.deepcopy(model)
    given = point(**{**GIVEN, "evaluate_at": "theta"})
    state = module.init_optimizer_state(workload, model, None, given, None)
    optimizer = plain_optimizer(name, plain.parameters())
    base = optimizer.param_groups[0]["lr"]
    for step in range(12):
        state = run(module, workload, model, state, given, step, batch_of(step))
        plain_update(plain, optimizer, base, step)
        if step % 4 == 3:  # an evaluation, and another at once: neither may show in training
            prepare(module, workload, model, state, given, step)
            prepare(module, workload, model, state, given, step)
            with optimizer.base_iterate():
                for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(next(model.parameters()), next(plain.parameters()), atol=1e-6)
        else:
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert workload.dropout_rates == [0.25] * 12


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_the_benchmarks_checkpoint(name: str) -> None:
    """Catches x lost with a checkpoint that is saved while the parameters are at θ, and a schedule begun anew."""
    module, workload = submission(name), Workload()
    given = point(**{**GIVEN, "evaluate_at": "theta"})
    model = workload.init_model_fn(0)
    state = module.init_optimizer_state(workload, model, None, given, None)
    for step in range(3):
        state = run(module, workload, model, state, given, step, batch_of(step))
    prepare(module, workload, model, state, given, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), **{key: part.state_dict() for key, part in state.items()}}, file)
    other = workload.init_model_fn(7)
    resumed = module.init_optimizer_state(workload, other, None, given, None)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    other.load_state_dict(saved["model"])
    for key in resumed:
        resumed[key].load_state_dict(saved[key])
    for step in range(3, 6):
        state = run(module, workload, model, state, given, step, batch_of(step))
        resumed = run(module, workload, other, resumed, given, step, batch_of(step))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_ranks_have_the_same_bits_and_are_one_process(tmp_path: Path) -> None:
    """Catches ranks that weigh their halves alike when one has more examples that count, and ranks that drift apart."""
    job = launch("warm torchrun", 2, "tests/benchmarks/jobs/algoperf_ranks.py", tmp_path)
    assert job.code == 0, job.output[-3000:]
    for name in NAMES:
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        module, workload = submission(name), Workload()
        model = nn.Sequential(
            *(layer for layer in workload.init_model_fn(3) if not isinstance(layer, nn.BatchNorm1d))
        )
        state = module.init_optimizer_state(workload, model, None, None, None)
        for step in range(4):
            state = run(module, workload, model, state, None, step, batch_of(step))
        assert (
            workload.dropout_rates == [0.5] * 4
        )  # the self-tuning ruleset's one setting leaves it to the workload
        for ours, theirs in zip(first, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("algoperf") is None or "MNIST" not in os.environ,
    reason="needs AlgoPerf's own package (docs/algoperf.md says how to install it; it pins another torch) and $MNIST, "
    "the folder of the four IDX files",
)
def test_the_real_harness_trains_its_mnist(tmp_path: Path) -> None:
    """Catches whatever the interface above has otherwise than the benchmark itself."""
    command = [sys.executable, "-m", "benchmarks.algoperf.check", "--mnist", os.environ["MNIST"]]
    subprocess.run([*command, "--output", str(tmp_path)], cwd=REPOSITORY, check=True, timeout=500)
